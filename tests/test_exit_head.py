"""exit_head and gather_tokens against loops over rows; what every exit op refuses."""

from __future__ import annotations

import brute_force
import pytest
import torch
import torch.nn.functional as F
from cases.halting import check_halting, make_canvas, make_scores
from floors import refused
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build
from tensors import LOW_PRECISION, ROW_VIEWS, close, error_rule, gradients, poison
from torch import Tensor

import step_kernels as sk


@pytest.mark.parametrize("trim", (False, True))
@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_gather_tokens(name: str, spare: int | None, trim: bool) -> None:
    plain = AWKWARD[name]
    layout = build(plain, spare)
    live = len(plain.tokens())
    scores = make_scores(plain, layout.capacity)
    halting = sk.halt_tokens(scores, layout, 0.6)
    if trim:
        halting = halting.trim()
        assert halting.layout.trimmed and len(halting.rows) == halting.layout.num_tokens
    survivors = brute_force.halt(scores, plain, 0.6).survivors
    for dtype in (torch.float64, torch.bfloat16):
        tokens = poison(torch.randn(layout.capacity, 3, dtype=torch.float64).to(dtype), live).requires_grad_()
        packed = sk.gather_tokens(tokens, halting)
        assert packed.shape == (halting.layout.capacity, 3)
        assert torch.equal(packed[: len(survivors)], tokens[survivors])
        assert not packed[len(survivors) :].any()
        cotangent = poison(torch.randn_like(packed), len(survivors))
        expected = torch.zeros_like(tokens)
        expected[survivors] = cotangent[: len(survivors)]
        assert torch.equal(gradients(packed, [tokens], cotangent)[0], expected)
        undefined = sk.gather_tokens(tokens, halting, tail="undefined")
        assert torch.equal(undefined[: len(survivors)], packed[: len(survivors)])


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_gather_strides(view: str) -> None:
    plain = AWKWARD["prefix_5"]
    layout = build(plain, 3)
    halting = sk.halt_tokens(make_scores(plain, layout.capacity), layout, 0.6)
    tokens = torch.randn(layout.capacity, 6)
    assert torch.equal(sk.gather_tokens(ROW_VIEWS[view](tokens), halting), sk.gather_tokens(tokens, halting))


def head_inputs(plain: PlainLayout, capacity: int, dim: int = 6, classes: int = 4) -> dict[str, Tensor]:
    shapes = {"norm_weight": (dim,), "norm_bias": (dim,), "weight": (classes, dim), "bias": (classes,)}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return {"tokens": poison(torch.randn(capacity, dim, dtype=torch.float64), len(plain.tokens())), **inputs}


@pytest.mark.parametrize("replayed", (False, True))
@pytest.mark.parametrize("keep_per_class", (0, 1))
@pytest.mark.parametrize("name", AWKWARD)
def test_exit_head(name: str, keep_per_class: int, replayed: bool) -> None:
    plain = AWKWARD[name]
    layout = build(plain, 3)
    inputs, canvas = head_inputs(plain, layout.capacity), make_canvas(plain)
    live = len(plain.tokens())
    normed = brute_force.layer_norm(inputs["tokens"][:live], inputs["norm_weight"], inputs["norm_bias"], 1e-3)
    scores = brute_force.linear(normed, inputs["weight"], inputs["bias"])
    values = torch.cat(
        [torch.zeros(0, 4, dtype=torch.float64)]
        + [(row - row.max() - torch.exp(row - row.max()).sum().log())[None] for row in scores]
    )
    mask = torch.rand(layout.capacity) < 0.5 if replayed else None
    before = canvas.clone()
    options = {"eps": 1e-3, "keep_per_class": keep_per_class, "canvas": canvas, "halted": mask}
    halting = sk.exit_head(layout=layout, threshold=0.8, **inputs, **options)
    expected = brute_force.halt(
        scores, plain, 0.8, keep_per_class=keep_per_class, mask=None if mask is None else mask.tolist()[:-3]
    )
    # The canvas is compared apart: its values come out of a matmul.
    assert halting.canvas is canvas
    close(canvas, brute_force.scatter_into(before, values, plain, expected.written))
    check_halting(
        sk.Halting(**{**{f: getattr(halting, f) for f in halting.__dataclass_fields__}, "canvas": None}),
        expected,
        values,
        plain,
        None,
    )


def test_exit_head_is_for_inference() -> None:
    plain = AWKWARD["prefix_5"]
    layout = build(plain)
    inputs = head_inputs(plain, layout.capacity)
    inputs["tokens"].requires_grad_()
    with pytest.raises(ValueError, match=r"tokens.*gradient"):
        sk.exit_head(layout=layout, threshold=0.8, **inputs)
    with torch.no_grad():
        sk.exit_head(layout=layout, threshold=0.8, **inputs)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_exit_head_low_precision(dtype: torch.dtype) -> None:
    """Log-probabilities of every token, written by a mask that halts them all."""
    plain = PlainLayout(AWKWARD["ragged_3x5"].images, (3, 5))
    layout = build(plain)
    inputs = {name: tensor.to(dtype) for name, tensor in head_inputs(plain, layout.capacity, 32, 7).items()}
    canvas = make_canvas(plain, 7, dtype)
    sk.exit_head(
        layout=layout,
        threshold=0.5,
        canvas=canvas,
        halted=torch.ones(layout.capacity, dtype=torch.bool),
        **inputs,
    )

    def log_probabilities(tokens, norm_weight, norm_bias, weight, bias):
        normed = F.layer_norm(tokens, (32,), norm_weight, norm_bias, 1e-6)
        return F.linear(normed, weight, bias).log_softmax(1)

    truth = log_probabilities(**{name: tensor.double() for name, tensor in inputs.items()})
    maps = [
        brute_force.scatter_into(torch.zeros_like(canvas).to(values.dtype), values, plain)
        for values in (log_probabilities(**inputs), truth)
    ]
    error_rule(canvas, *maps)


GRID = sk.SupertokenLayout.uniform(1, (2, 3), num_prefix=1)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"scores": "x"}, TypeError, ["scores", "x"]),
        ({"scores": torch.zeros(6, 4)}, ValueError, ["scores", "7", "6, 4"]),
        ({"scores": torch.zeros(7, 0)}, ValueError, ["scores", "class"]),
        ({"scores": torch.zeros(7, 4, dtype=torch.int32)}, TypeError, ["scores", "int32"]),
        ({"scores": torch.zeros(4, 7).T}, ValueError, ["scores", "contiguous"]),
        ({"layout": [1]}, TypeError, ["layout", "list"]),
        ({"threshold": "x"}, TypeError, ["threshold", "x"]),
        ({"threshold": torch.zeros(1)}, ValueError, ["threshold", "1"]),
        ({"threshold": torch.tensor(1)}, TypeError, ["threshold", "int64"]),
        ({"activation": "sigmoid"}, ValueError, ["activation", "softmax", "sigmoid"]),
        ({"keep_per_class": -1}, ValueError, ["keep_per_class", "-1"]),
        ({"keep_per_class": 1.5}, TypeError, ["keep_per_class", "1.5"]),
        ({"values": torch.zeros(6, 4)}, ValueError, ["values", "7", "6, 4"]),
        ({"canvas": torch.zeros(1, 5, 2, 3)}, ValueError, ["canvas", "4", "1, 5, 2, 3"]),
        ({"canvas": torch.zeros(1, 4, 3, 2)}, ValueError, ["canvas", "2, 3", "3, 2"]),
        ({"canvas": torch.zeros(1, 4, 2, 3, requires_grad=True)}, ValueError, ["canvas", "gradient"]),
        ({"halted": torch.zeros(7)}, TypeError, ["halted", "bool", "float32"]),
        ({"halted": torch.zeros(6, dtype=torch.bool)}, ValueError, ["halted", "7", "6"]),
        ({"tokens": torch.zeros(6, 5)}, ValueError, ["tokens", "7", "6, 5"]),
        ({"weight": torch.zeros(4, 6)}, ValueError, ["weight", "5", "4, 6"]),
        ({"weight": torch.zeros(0, 5)}, ValueError, ["weight", "class"]),
        ({"bias": torch.zeros(5)}, ValueError, ["bias", "4", "5"]),
        ({"norm_weight": torch.zeros(4)}, ValueError, ["norm_weight", "5", "4"]),
        ({"norm_bias": torch.zeros(5).half()}, TypeError, ["norm_bias", "float32", "float16"]),
        ({"eps": "x"}, TypeError, ["eps", "x"]),
        ({"weight": torch.zeros(4, 5, requires_grad=True)}, ValueError, ["weight", "gradient"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    """Each op that takes the changed argument refuses it."""
    stage = {"layout": GRID, "threshold": 0.5, "keep_per_class": 0, "halted": None, "canvas": None}
    parameters = {"norm_weight": torch.zeros(5), "norm_bias": torch.zeros(5), "weight": torch.zeros(4, 5)}
    calls = {
        sk.halt_tokens: {**stage, "scores": torch.zeros(7, 4), "activation": "softmax", "values": None},
        sk.exit_head: {**stage, **parameters, "bias": torch.zeros(4), "tokens": torch.zeros(7, 5), "eps": 1e-6},
        sk.gather_tokens: {"tokens": torch.zeros(7, 5), "halting": sk.halt_tokens(torch.zeros(7, 4), GRID, 0.5)},
    }
    concerned = {op: arguments for op, arguments in calls.items() if set(change) <= set(arguments)}
    assert concerned
    for op, arguments in concerned.items():
        with refused(error, words):
            op(**{**arguments, **change})


def test_gather_names_what_is_wrong() -> None:
    with pytest.raises(TypeError, match=r"halting.*tuple"):
        sk.gather_tokens(torch.zeros(7, 5), (1, 2))  # type: ignore[arg-type]
