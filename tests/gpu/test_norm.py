"""ragged_layer_norm and its gradients on a GPU against the CPU reference."""

import pytest
import torch
from cases.norm import EPS, inputs, with_gradients
from floors import hold
from gpu.syncs import capture, needs_memory, same_where_not_current, ten_runs_are_identical
from layouts import row_of_tokens
from tensors import LOW_PRECISION, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [1, 150, 384, 1024, 5000])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_live_rows(width, dtype):
    layout = row_of_tokens(700, 0, 301, 999, capacity=5000)
    tensors, cotangent = inputs(5000, 2000, width, dtype), poison(torch.randn(5000, width).to(dtype), 2000)
    hold(with_gradients, tensors, cotangent, layout, device="cuda")


def test_runs_repeat():
    layout = row_of_tokens(3000, 4000, capacity=9000).to("cuda")
    tensors = [tensor.cuda() for tensor in inputs(9000, 7000, 1024, torch.bfloat16)]
    cotangent = torch.randn(9000, 1024, device="cuda", dtype=torch.bfloat16)
    ten_runs_are_identical(lambda: with_gradients(tensors, cotangent, layout))


def test_batch_mates_do_not_matter():
    x, weight, bias = (tensor.cuda() for tensor in inputs(3000, 3000, 1024, torch.float32))
    together = sk.ragged_layer_norm(x, weight, bias, EPS, layout=row_of_tokens(1001, 999, capacity=3000).to("cuda"))
    alone = sk.ragged_layer_norm(x[1001:2001], weight, bias, EPS, layout=row_of_tokens(999, capacity=1000).to("cuda"))
    assert torch.equal(alone[:999], together[1001:2000])


def test_a_captured_norm_replays_on_other_counts():
    layout = row_of_tokens(100, 200, capacity=1000).to("cuda")
    x, weight, bias = (tensor.cuda() for tensor in inputs(1000, 1000, 1024, torch.float16))
    run = lambda: [sk.ragged_layer_norm(x, weight, bias, EPS, layout=layout)]  # noqa: E731
    replay = capture(run)
    for live in (0, 1, 700, 1000):
        layout.cu_seqlens.copy_(torch.tensor([0, live // 2, live]))
        x.normal_()
        (out,) = replay()
        assert torch.equal(out, *run()) and not out[live:].any()


def test_more_than_2_to_the_31_elements():
    rows, width = 2**21 + 1, 1024
    needs_memory(20)
    x = torch.zeros(rows, width, device="cuda", dtype=torch.float16)
    ends = torch.randn(2, width, device="cuda", dtype=torch.float16)
    x[0], x[-1] = ends
    weight, bias = (torch.randn(width, device="cuda", dtype=torch.float16) for _ in range(2))
    out = sk.ragged_layer_norm(x, weight, bias, EPS)
    assert torch.equal(out[[0, -1]], sk.ragged_layer_norm(ends, weight, bias, EPS))
    assert torch.equal(out[rows // 2], bias)
    needed = [True, True, True]
    grads = torch.ops.step_kernels.ragged_layer_norm_backward(x, x, weight, bias, EPS, None, needed)
    expected = torch.ops.step_kernels.ragged_layer_norm_backward(ends, ends, weight, bias, EPS, None, needed)
    assert torch.equal(grads[0][[0, -1]], expected[0])
    torch.testing.assert_close(grads[2], expected[2])


def test_a_device_that_is_not_current():
    tensors = inputs(300, 300, 384, torch.float32)
    same_where_not_current(lambda device: [sk.ragged_layer_norm(*(x.to(device) for x in tensors), EPS)])
