"""The harness finds what it is there to find; Triton's repaired arithmetic is right."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import supervision
from triton.runtime.errors import InterpreterError


@triton.jit
def shifted_copy_kernel(out_ptr, x_ptr, size, shift, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index + shift, mask=index < size), mask=index < size)


@triton.jit
def running_order_kernel(out_ptr, counter_ptr):
    position = tl.load(counter_ptr)
    tl.store(out_ptr + position, tl.program_id(0))
    tl.store(counter_ptr, position + 1)


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, SIZE: tl.constexpr):
    row, col = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + row * SIZE + col), tl.load(b_ptr + row * SIZE + col)
    tl.store(out_ptr + row * SIZE + col, tl.dot(a, b).to(out_ptr.dtype.element_ty))


@triton.jit
def loaded_bound_kernel(out_ptr, bound_ptr):
    total = 0
    for i in range(0, tl.load(bound_ptr)):
        total += i
    tl.store(out_ptr, total)


@pytest.mark.parametrize("shift", [1, -1, 1000])
def test_a_read_outside_its_argument_is_found(shift):
    x, out = torch.zeros(100)[10:90], torch.zeros(80)  # inside the storage, outside the view
    with pytest.raises((supervision.OutOfBounds, InterpreterError), match="outside every argument"):
        shifted_copy_kernel[(5,)](out, x, 80, shift, BLOCK=16)


def test_masked_lanes_may_point_anywhere():
    x, out = torch.arange(80.0), torch.zeros(80)
    shifted_copy_kernel[(2,)](out, x, 80, 0, BLOCK=64)
    assert torch.equal(out, x)


def test_programs_run_in_another_order():
    orders = []
    for seed in (None, 1, 2):
        supervision.shuffle_programs(seed)
        out, counter = torch.full((8,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        running_order_kernel[(8,)](out, counter)
        orders.append(out.tolist())
    assert orders[0] == list(range(8))
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[1] != orders[0] and orders[2] != orders[1]


def test_launches_are_counted(kernels):
    out, bound = torch.zeros(1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    loaded_bound_kernel[(1,)](out, bound)
    assert kernels == ["loaded_bound_kernel"] and out.item() == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_right(dtype):
    a, b = torch.randn(16, 16, dtype=dtype), torch.randn(16, 16, dtype=dtype)
    out = torch.empty(16, 16, dtype=dtype)
    dot_kernel[(1,)](out, a, b, SIZE=16)
    torch.testing.assert_close(out, (a.float() @ b.float()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_a_row_of_a_dot_is_the_same_at_every_place():
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    out, turned = torch.empty(16, 16), torch.empty(16, 16)
    dot_kernel[(1,)](out, a, b, SIZE=16)
    for places in range(1, 16):
        dot_kernel[(1,)](turned, a.roll(places, 0), b, SIZE=16)
        assert torch.equal(turned.roll(-places, 0), out)


def test_bfloat16_rounds_to_nearest_even():
    x = torch.cat([torch.randn(254), torch.tensor([float("inf"), float("nan")])])
    out = torch.empty(256, dtype=torch.bfloat16)
    shifted_copy_kernel[(1,)](out, x, 256, 0, BLOCK=256)
    assert torch.equal(out.view(torch.int16)[:-1], x.bfloat16().view(torch.int16)[:-1]) and out[-1].isnan()
