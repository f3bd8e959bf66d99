"""ragged_layer_norm and its gradients as kernels, against the reference."""

import pytest
import torch
from cases.norm import EPS, inputs, large_and_shifted_rows, with_gradients
from floors import hold
from interpreter import supervision
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build
from tensors import LOW_PRECISION, ROW_VIEWS, identical, new_memory_is_nan, poison

import step_kernels as sk
from step_kernels.triton.norm import launch as norm

WIDTH = 24
FORWARD = ["layer_norm_kernel"]
BACKWARD = ["layer_norm_backward_kernel", "layer_norm_parameters_kernel", "sum_chunks_kernel"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of several blocks of columns, programs of several blocks of rows, several shares of the parameters' sums."""
    monkeypatch.setattr(norm, "COLUMNS", 16)
    monkeypatch.setattr(norm, "STEP_COLUMNS", 16)
    monkeypatch.setattr(norm, "ELEMENTS", 64)
    monkeypatch.setattr(norm, "FORWARD_PROGRAMS", (1, 1, 1))
    monkeypatch.setattr(norm, "BACKWARD_PROGRAMS", (1, 1, 1))
    monkeypatch.setattr(norm, "PARAMETER_ROWS", 4)
    monkeypatch.setattr(norm, "PARAMETER_COLUMNS", 16)
    monkeypatch.setattr(norm, "CHUNKS", 4)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_live_rows(name, spare, kernels):
    layout, live = build(AWKWARD[name], spare), len(AWKWARD[name].tokens())
    tensors = inputs(layout.capacity, live, WIDTH, torch.float32)
    supervision.shuffle_programs(1)
    hold(with_gradients, tensors, poison(torch.randn(layout.capacity, WIDTH), live), layout)
    assert kernels == (FORWARD + BACKWARD if layout.capacity else [])
    if not layout.capacity:
        kernels.append("an empty batch needs no kernel")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("width", [1, 7, 40])
def test_widths(width, dtype, small_blocks):
    layout = build(AWKWARD["ragged_3x5"], 5)
    live = layout.num_tokens
    tensors = inputs(layout.capacity, live, width, dtype)
    hold(with_gradients, tensors, poison(torch.randn(layout.capacity, width).to(dtype), live), layout)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_rows_that_registers_hold(dtype):
    tensors = inputs(40, 40, 384, dtype)
    hold(with_gradients, tensors, torch.randn(40, 384).to(dtype))


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(given, small_blocks):
    x, *parameters = inputs(9, 9, 20, torch.float32)
    parameters = [value if there else None for value, there in zip(parameters, given, strict=True)]
    hold(with_gradients, [x, *parameters], torch.randn(9, 20))


@pytest.mark.parametrize("needed", [[True, False, False], [False, True, False], [False, False, True], [False] * 3])
def test_only_what_is_needed(needed, kernels):
    tensors = inputs(9, 9, 20, torch.float32)
    arguments = torch.randn(9, 20), *tensors, EPS, None, needed
    found = torch.ops.step_kernels.ragged_layer_norm_backward(*arguments)
    assert kernels == (BACKWARD if any(needed[1:]) else BACKWARD[:1] if needed[0] else [])
    everything = torch.ops.step_kernels.ragged_layer_norm_backward(*arguments[:-1], [True] * 3)
    for got, want, whole in zip(found, needed, everything, strict=True):
        assert torch.equal(got, whole) if want else got.shape == (0,)


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_strides(view):
    change = ROW_VIEWS[view]
    x, weight, bias = inputs(9, 9, 20, torch.float32)
    cotangent = torch.randn(9, 20)
    plain = with_gradients((x, weight, bias), cotangent)
    for other in (change(cotangent), cotangent.T.contiguous().T):
        identical(with_gradients((change(x), weight, bias), other), plain)
    expanded = x[:1].expand(9, 20), weight[:1].expand(20), bias
    identical(with_gradients(expanded, cotangent), with_gradients([y.clone() for y in expanded], cotangent))
    identical(
        with_gradients((x, weight, bias), torch.ones(()).expand(9, 20)),
        with_gradients((x, weight, bias), torch.ones(9, 20)),
    )


def test_an_undefined_tail_is_not_written():
    layout = build(AWKWARD["prefix_5"], 3)
    live = layout.num_tokens
    tensors = inputs(layout.capacity, live, 8, torch.float32)
    with new_memory_is_nan():
        filled, ours = (sk.ragged_layer_norm(*tensors, EPS, layout=layout, tail=tail) for tail in ("zero", "undefined"))
    assert torch.equal(ours[:live], filled[:live])
    assert ours[live:].isnan().all() and not filled[live:].any()


def test_batch_mates_do_not_matter(small_blocks):
    plain = AWKWARD["ragged_3x5"]
    layout = build(plain, 4)
    tensors = inputs(layout.capacity, layout.num_tokens, 20, torch.float32)
    together = sk.ragged_layer_norm(*tensors, EPS, layout=layout)
    start, stop = layout.cu_seqlens[1:3].tolist()
    alone = build(PlainLayout(plain.images[1:2], plain.grid), 1)
    x = torch.cat([tensors[0][start:stop], tensors[0][-1:]])
    assert torch.equal(sk.ragged_layer_norm(x, *tensors[1:], EPS, layout=alone)[:-1], together[start:stop])


def test_nan_and_infinity_stay_in_their_rows():
    tensors = inputs(9, 9, 20, torch.float16)
    clean = sk.ragged_layer_norm(*tensors, EPS)
    tensors[0][3, 2], tensors[0][5, 7] = float("nan"), float("inf")
    result = sk.ragged_layer_norm(*tensors, EPS)
    others = [0, 1, 2, 4, 6, 7, 8]
    assert result[[3, 5]].isnan().all() and torch.equal(result[others], clean[others])


def test_large_and_shifted_rows_in_half_precision(small_blocks):
    hold(with_gradients, large_and_shifted_rows(), torch.randn(2, 64).half())


def test_addresses_that_need_64_bits():
    """Rows 2^30 elements apart, so that only the product of row and stride passes 2^31; memory between them is never touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    x = storage.as_strided((3, 16), (2**30 + 16, 1))
    dense = torch.randn(3, 16).half()
    x.copy_(dense)
    weight, bias = torch.randn(16).half(), torch.randn(16).half()
    assert torch.equal(sk.ragged_layer_norm(x, weight, bias, EPS), sk.ragged_layer_norm(dense, weight, bias, EPS))
    ours = torch.ops.step_kernels.ragged_layer_norm_backward(x, x, weight, bias, EPS, None, [True] * 3)
    identical(
        ours, torch.ops.step_kernels.ragged_layer_norm_backward(dense, dense, weight, bias, EPS, None, [True] * 3)
    )


def test_runs_in_any_order_are_identical(small_blocks):
    tensors, cotangent = inputs(15, 15, 20, torch.float32), torch.randn(15, 20)
    first = with_gradients(tensors, cotangent)
    for seed in range(3):
        supervision.shuffle_programs(seed)
        identical(with_gradients(tensors, cotangent), first)
