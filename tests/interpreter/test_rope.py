"""rope_table, ragged_rope and its gradient as kernels, against the reference."""

import pytest
import torch
from cases.rope import table_of, with_gradients
from floors import hold, reference
from interpreter import supervision
from layouts import AWKWARD, SPARE_ROWS, build
from tensors import LOW_PRECISION, ROW_VIEWS, identical, new_memory_is_nan, poison, swapped

import step_kernels as sk
from step_kernels.triton import rope


@pytest.fixture
def small_blocks(monkeypatch):
    """Several programs over the rows and over the heads, several heads in a program."""
    monkeypatch.setattr(rope, "ELEMENTS", 32)
    monkeypatch.setattr(rope, "HEADS", 2)


def a_layout(name, spare):
    """Its cells past the live rows hold nonsense, as far as integers go."""
    layout, live = build(AWKWARD[name], spare), len(AWKWARD[name].tokens())
    object.__setattr__(layout, "cells", poison(layout.cells, live))
    return layout, live


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_table(name, spare, kernels):
    supervision.shuffle_programs(1)
    layout, _ = a_layout(name, spare)
    for frequencies, phases in ((torch.randn(3, 2) / 8, torch.randn(3)), (torch.randn(2, 5).T / 8, None)):
        hold(table_of, layout, frequencies, phases)
    assert kernels == ["rope_table_kernel"] * (2 if layout.capacity else 0)
    if not layout.capacity:
        kernels.append("an empty batch needs no kernel")


def test_sines_of_every_quarter_and_of_many_turns():
    """A whole number of turns in a cell's coordinate, so that fp32 holds each angle exactly."""
    layout = sk.SupertokenLayout.uniform(1, (1, 1025))
    frequencies = torch.tensor([[0.0, 2.0**-10], [0.0, 2.0**-3], [0.0, 3.0 + 2.0**-7], [0.0, -(2.0**-9)]])
    table = sk.rope_table(layout, frequencies, torch.tensor([-0.5, 0.0, 0.25, 1000.0]))
    truth = reference(sk.rope_table, layout, frequencies.double(), torch.tensor([-0.5, 0.0, 0.25, 1000.0]).double())
    assert (table.double() - truth).abs().max() < 2e-7
    assert table[0].tolist() == pytest.approx([0, 0, 1, 0, -1, 1, 0, 1], abs=1e-7)


def test_angles_that_are_not_finite_are_nan():
    layout = sk.SupertokenLayout.uniform(1, (1, 3), num_prefix=1)
    table = sk.rope_table(layout, torch.tensor([[0.0, float("inf")], [0.0, float("nan")]]))
    assert table[1:].isnan().all() and table[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("rotate_half", [True, False])
@pytest.mark.parametrize("name", AWKWARD)
def test_rotation_and_gradients(name, rotate_half, kernels):
    supervision.shuffle_programs(2)
    layout, live = a_layout(name, 3)
    table = poison(torch.randn(layout.capacity, 6), live)
    tensors = [poison(torch.randn(layout.capacity, heads, 6), live) for heads in (5, 2)]
    cotangents = [poison(torch.randn_like(tensor), live) for tensor in tensors]

    hold(with_gradients, *tensors, table, cotangents, rotate_half, layout)
    assert kernels == ["rope_kernel"] * 2


@pytest.mark.parametrize("rotate_half", [True, False])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("width", [2, 8, 20])
def test_widths(width, dtype, rotate_half, small_blocks):
    layout, live = a_layout("ragged_3x5", 5)
    q, k = (poison(torch.randn(layout.capacity, heads, width).to(dtype), live) for heads in (5, 3))
    table = poison(torch.randn(layout.capacity, width), live)
    hold(lambda q, k, table: sk.ragged_rope(q, k, table, rotate_half=rotate_half, layout=layout), q, k, table)


@pytest.mark.parametrize("rotate_half", [True, False])
@pytest.mark.parametrize("view", [*ROW_VIEWS, "swapped", "qkv"])
def test_any_strides(view, rotate_half, small_blocks):
    make = {**ROW_VIEWS, "swapped": swapped, "qkv": lambda x: torch.stack((x, x + 1, x), 1)[:, 0]}[view]
    q, k, table = torch.randn(9, 3, 8), torch.randn(9, 3, 8), torch.randn(9, 8)
    expected = sk.ragged_rope(q, k, table, rotate_half=rotate_half)
    strided = table if view in ("swapped", "qkv") else make(table)
    identical(sk.ragged_rope(make(q), make(k), strided, rotate_half=rotate_half), expected)
    backward = torch.ops.step_kernels.ragged_rope_backward
    grad = torch.randn(9, 8, 3).mT, torch.randn(1, 1, 1).expand(9, 3, 8)
    dense = [g.contiguous() for g in grad]
    identical(backward(*grad, table, None, rotate_half), backward(*dense, table, None, rotate_half))


def test_undefined_tails_are_left_alone():
    layout, live = a_layout("holes", None)
    with new_memory_is_nan():
        table = sk.rope_table(layout, torch.randn(3, 2), tail="undefined")
        q = poison(torch.randn(layout.capacity, 2, 6), live)
        results = table, *sk.ragged_rope(q, q, table, layout=layout, tail="undefined")
    for result in results:
        assert 0 < live < len(result) and result[live:].isnan().all() and not result[:live].isnan().any()


def test_nan_and_overflow_stay_in_their_pair():
    q = torch.full((3, 1, 4), 60000.0, dtype=torch.float16)
    q[1, 0, 0] = float("nan")
    table = torch.full((3, 4), 2.0)
    for rotate_half in (True, False):
        ours = sk.ragged_rope(q, q, table, rotate_half=rotate_half)[0]
        expected = reference(sk.ragged_rope, q, q, table, rotate_half=rotate_half)[0]
        assert torch.equal(ours.nan_to_num(1, 2, 3), expected.nan_to_num(1, 2, 3)) and ours.isinf().any()
        assert ours.isnan().sum() == 2


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_empty_tensors(shape, kernels):
    x = torch.zeros(shape)
    for out in sk.ragged_rope(x, x, torch.zeros(shape[0], shape[2])):
        assert out.shape == shape
    assert kernels == []
    kernels.append("nothing to rotate")


def test_keys_without_heads():
    q, k = torch.randn(3, 2, 4), torch.zeros(3, 0, 4)
    out, none = sk.ragged_rope(q, k, torch.randn(3, 4))
    assert none.shape == k.shape and out.abs().sum() > 0


@pytest.mark.parametrize("far", (2**30 + 8, 2**31 + 8))
def test_offsets_past_2_to_the_31(far):
    """Row strides that fit 32 bits with offsets that do not, and strides that do not fit, in memory that is reserved but hardly touched."""
    memory = torch.empty(3 * far + 8, dtype=torch.float16)
    rows, heads = memory.as_strided((4, 1, 4), (far, 4, 1)), memory.as_strided((1, 4, 4), (4, far, 1))
    for x in (rows, heads):
        x.copy_(torch.arange(16).view(x.shape))
        table = torch.randn(x.shape[0], 4)
        expected = reference(sk.ragged_rope, x.clone(), x.clone(), table)
        for one, other in zip(sk.ragged_rope(x, x, table), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
