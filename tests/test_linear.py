"""ragged_linear against one row and one output column at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import brute_force
import pytest
import torch
import torch.nn.functional as F
from cases.linear import ACTIVATIONS, OPTIONAL, inputs, overflowing
from floors import refused
from layouts import AWKWARD, SPARE_ROWS, build
from tensors import LOW_PRECISION, ROW_VIEWS, agree, close, gradients, rule_with_gradients
from torch import Tensor

import step_kernels as sk


def leaves(
    rows: int, live: int, shape: tuple[int, int] = (6, 4), dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in inputs(rows, live, shape, dtype).items()}


def live_rows(tensors: dict[str, Tensor], live: int) -> dict[str, Tensor]:
    return {name: tensor[:live] if name in ("x", "residual") else tensor for name, tensor in tensors.items()}


def plain_pytorch(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, residual: Tensor, activation: str | None):
    value = F.linear(x, weight, bias)
    if activation is not None:
        value = F.gelu(value, approximate="tanh" if activation == "gelu_tanh" else "none")
    return residual + gamma * value


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_live_rows(name: str, spare: int | None, activation: str | None) -> None:
    plain = AWKWARD[name]
    layout, live = build(plain, spare), len(plain.tokens())
    tensors = leaves(layout.capacity, live)
    result = sk.ragged_linear(layout=layout, activation=activation, **tensors)
    truth = brute_force.linear(activation=activation, **live_rows(tensors, live))
    agree(result, truth, list(tensors.values()))
    undefined = sk.ragged_linear(layout=layout, activation=activation, tail="undefined", **tensors)
    assert torch.equal(undefined[:live], result[:live])


def test_expected_counts_change_no_result_and_compile_once_more_at_most() -> None:
    """A new estimate, say after each run, must not cost a compilation each."""
    layout = build(AWKWARD["prefix_5"], 3)
    tensors = leaves(layout.capacity, layout.num_tokens)
    expected = sk.ragged_linear(layout=layout, **tensors)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda layout: sk.ragged_linear(layout=layout, **tensors), fullgraph=True, backend=counting
    )
    for count in (8, 5, 11, 400, 77):
        hinted = replace(layout, expected_tokens=count)
        assert torch.equal(sk.ragged_linear(layout=hinted, **tensors), expected)
        assert torch.equal(compiled(hinted), expected)
    assert len(graphs) <= 2


@pytest.mark.parametrize("chosen", [c for size in range(4) for c in itertools.combinations(OPTIONAL, size)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_combination_of_parts(chosen: tuple[str, ...], activation: str | None) -> None:
    tensors = {name: t for name, t in leaves(7, 7).items() if name not in OPTIONAL or name in chosen}
    result = sk.ragged_linear(activation=activation, **tensors)
    agree(result, brute_force.linear(activation=activation, **tensors), list(tensors.values()))


@pytest.mark.parametrize("needs", ("x", "weight", "bias", "gamma", "residual"))
def test_gradient_of_one_argument_alone(needs: str) -> None:
    tensors = {name: tensor.detach() for name, tensor in leaves(7, 7).items()}
    tensors[needs].requires_grad_()
    result = sk.ragged_linear(activation="gelu", **tensors)
    agree(result, brute_force.linear(activation="gelu", **tensors), [tensors[needs]])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 3)])
@pytest.mark.parametrize("rows", (0, 1, 9))
def test_without_a_layout_every_row_is_live(rows: int, shape: tuple[int, int]) -> None:
    tensors = leaves(rows, rows, shape)
    agree(sk.ragged_linear(**tensors), brute_force.linear(**tensors), list(tensors.values()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision(dtype: torch.dtype, activation: str | None) -> None:
    tensors = leaves(40, 40, (48, 24), dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    rule_with_gradients(
        sk.ragged_linear(activation=activation, **tensors),
        plain_pytorch(activation=activation, **tensors),
        brute_force.linear(activation=activation, **exact),
        list(tensors.values()),
        list(exact.values()),
    )


def test_half_precision_sums_do_not_overflow() -> None:
    assert torch.equal(sk.ragged_linear(*overflowing()), torch.zeros(3, 2, dtype=torch.float16))


def test_the_two_gelus_differ() -> None:
    x = torch.linspace(-4, 4, 99, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    exact, tanh = (sk.ragged_linear(x, one, activation=name) for name in ("gelu", "gelu_tanh"))
    close(exact, F.gelu(x))
    close(tanh, F.gelu(x, approximate="tanh"))
    assert (exact - tanh).abs().max() > 1e-4


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_strides(view: str) -> None:
    change = ROW_VIEWS[view]
    tensors = {
        name: change(tensor.detach()).requires_grad_() if tensor.dim() == 2 else tensor
        for name, tensor in leaves(9, 9).items()
    }
    agree(sk.ragged_linear(**tensors), brute_force.linear(**tensors), list(tensors.values()))
    tensors["x"] = tensors["x"].detach()[:1].expand(9, 6).requires_grad_()
    result, truth = sk.ragged_linear(**tensors), brute_force.linear(**tensors)
    for cotangent in (change(torch.randn_like(truth)), torch.ones_like(truth[:1]).expand_as(truth)):
        dense = cotangent.clone(memory_format=torch.contiguous_format)
        for ours, theirs in zip(
            gradients(sk.ragged_linear(**tensors), list(tensors.values()), cotangent),
            gradients(brute_force.linear(**tensors), list(tensors.values()), dense),
            strict=True,
        ):
            close(ours, theirs)
    close(result, truth)


def test_nan_stays_in_its_row() -> None:
    tensors = {name: tensor.detach() for name, tensor in leaves(9, 9).items()}
    clean = sk.ragged_linear(**tensors)
    tensors["x"][3, 1] = float("nan")
    result = sk.ragged_linear(**tensors)
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert result[3].isnan().all() and torch.equal(result[others], clean[others])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": "x"}, TypeError, ["x", "str"]),
        ({"x": torch.zeros(1, 15, 6)}, ValueError, ["x", "1, 15, 6"]),
        ({"x": torch.zeros(14, 6)}, ValueError, ["x", "15", "14"]),
        ({"x": torch.zeros(6, 15).T}, ValueError, ["x"]),
        ({"x": torch.zeros(15, 6, dtype=torch.int64)}, TypeError, ["x", "int64"]),
        ({"weight": torch.zeros(4, 5)}, ValueError, ["weight", "6", "4, 5"]),
        ({"weight": torch.zeros(4, 6, dtype=torch.bfloat16)}, TypeError, ["weight", "float32", "bfloat16"]),
        ({"bias": torch.zeros(6)}, ValueError, ["bias", "4", "6"]),
        ({"gamma": torch.zeros(4, 1)}, ValueError, ["gamma", "4, 1"]),
        ({"residual": torch.zeros(15, 6)}, ValueError, ["residual", "15, 4", "15, 6"]),
        ({"activation": "relu"}, ValueError, ["activation", "gelu", "relu"]),
        ({"layout": "x"}, TypeError, ["layout", "x"]),
        ({"tail": "one"}, ValueError, ["tail", "zero", "one"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    layout = sk.SupertokenLayout.uniform(1, (3, 5))
    defaults = {"x": torch.zeros(15, 6), "weight": torch.zeros(4, 6), "layout": layout}
    with refused(error, words):
        sk.ragged_linear(**{**defaults, **change})
