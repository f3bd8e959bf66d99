"""ragged_layer_norm against one row at a time."""

from __future__ import annotations

import brute_force
import pytest
import torch
import torch.nn.functional as F
from cases.norm import EPS, inputs, large_and_shifted_rows
from floors import refused
from layouts import AWKWARD, SPARE_ROWS, build
from tensors import LOW_PRECISION, ROW_VIEWS, agree, close, error_rule, gradients, rule_with_gradients
from torch import Tensor

import step_kernels as sk


def leaves(rows: int, live: int, dim: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in inputs(rows, live, dim, dtype)]


def check(result: Tensor, truth: Tensor, tensors: list[Tensor]) -> None:
    agree(result, truth, tensors, of_gradients=1e-11)


@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_live_rows(name: str, spare: int | None) -> None:
    plain = AWKWARD[name]
    layout, live = build(plain, spare), len(plain.tokens())
    tensors = leaves(layout.capacity, live)
    result = sk.ragged_layer_norm(*tensors, EPS, layout=layout)
    check(result, brute_force.layer_norm(tensors[0][:live], *tensors[1:], EPS), tensors)
    assert torch.equal(sk.ragged_layer_norm(*tensors, EPS, layout=layout, tail="undefined")[:live], result[:live])


@pytest.mark.parametrize("dim", (1, 2, 7, 384))
@pytest.mark.parametrize("rows", (0, 1, 9))
def test_without_a_layout_every_row_is_live(rows: int, dim: int) -> None:
    tensors = leaves(rows, rows, dim)
    check(sk.ragged_layer_norm(*tensors, 1e-3), brute_force.layer_norm(*tensors, 1e-3), tensors)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(dtype: torch.dtype) -> None:
    tensors = leaves(40, 40, 96, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    rival = F.layer_norm(tensors[0], (96,), *tensors[1:], EPS)
    truth = brute_force.layer_norm(*exact, EPS)
    rule_with_gradients(sk.ragged_layer_norm(*tensors, EPS), rival, truth, tensors, exact)


def test_large_and_shifted_rows_in_half_precision() -> None:
    x, weight, bias = large_and_shifted_rows()
    result = sk.ragged_layer_norm(x, weight, bias, EPS)
    error_rule(result, F.layer_norm(x, (64,), weight, bias, EPS), brute_force.layer_norm(x, weight, bias, EPS))


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_strides(view: str) -> None:
    tensors = [tensor.detach() for tensor in leaves(9, 9)]
    x = ROW_VIEWS[view](tensors[0]).requires_grad_()
    check(sk.ragged_layer_norm(x, *tensors[1:], EPS), brute_force.layer_norm(x, *tensors[1:], EPS), [x])
    expanded = tensors[0][:1].expand(9, 6).requires_grad_()
    result, truth = (norm(expanded, *tensors[1:], EPS) for norm in (sk.ragged_layer_norm, brute_force.layer_norm))
    close(result, truth)
    cotangent = ROW_VIEWS[view](torch.randn(9, 6, dtype=torch.float64))
    dense = cotangent.clone(memory_format=torch.contiguous_format)
    close(gradients(result, [expanded], cotangent)[0], gradients(truth, [expanded], dense)[0])


def test_rows_do_not_matter_to_each_other() -> None:
    x, weight, bias = (tensor.detach().float() for tensor in leaves(9, 9))
    together = sk.ragged_layer_norm(x, weight, bias, EPS)
    for row in range(9):
        assert torch.equal(sk.ragged_layer_norm(x[row : row + 1], weight, bias, EPS)[0], together[row])
    x[3, 2] = float("nan")
    result = sk.ragged_layer_norm(x, weight, bias, EPS)
    assert result[3].isnan().all() and torch.equal(result[4:], together[4:]) and torch.equal(result[:3], together[:3])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": "x"}, TypeError, ["x", "str"]),
        ({"x": torch.zeros(2, 3, 6)}, ValueError, ["x", "2, 3, 6"]),
        ({"x": torch.zeros(6, 4).T}, ValueError, ["x"]),
        ({"x": torch.zeros(15, 6, dtype=torch.int64)}, TypeError, ["x", "int64"]),
        ({"weight": torch.zeros(5)}, ValueError, ["weight", "6", "5"]),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, TypeError, ["bias", "float32", "float64"]),
        ({"eps": "x"}, TypeError, ["eps", "x"]),
        ({"layout": 3}, TypeError, ["layout", "3"]),
        ({"tail": None}, ValueError, ["tail", "zero", "None"]),
        ({"x": torch.zeros(3, 6)}, ValueError, ["x", "15", "3"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    layout = sk.SupertokenLayout.uniform(1, (3, 5))
    defaults = {"x": torch.zeros(15, 6), "weight": torch.ones(6), "bias": torch.zeros(6), "eps": EPS, "layout": layout}
    with refused(error, words):
        sk.ragged_layer_norm(**{**defaults, **change})
