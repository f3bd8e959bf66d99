"""Every public op as PyTorch's ecosystem meets it: tensors that are none, forward-mode differentiation, results written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import samples
import torch
import torch.masked
from layouts import build
from samples import BATCH, CELLS, CLASSES, DIM, PATCH, PREFIX, canvas, images, matrix, vector
from torch import Tensor
from torch.autograd import forward_ad

import step_kernels as sk

LAYOUT = build(samples.PLAIN)
ROWS = LAYOUT.capacity
SEGMENTS = {"cu_seqlens": LAYOUT.cu_seqlens, "max_seqlen": LAYOUT.max_seqlen}
Call = tuple[Callable[..., Any], dict[str, Any]]


def rows(width: int = DIM) -> Tensor:
    return torch.randn(ROWS, width)


def heads() -> Tensor:
    return torch.randn(ROWS, 2, 8)


def half() -> Tensor:
    return torch.arange(ROWS) % 2 == 0


CALLS: dict[str, Callable[[], dict[str, Any]]] = {  # every tensor that an op can be given, by the argument's name
    "attention_schedule": lambda: {"cu_seqlens": LAYOUT.cu_seqlens, "num_rows": ROWS},
    "class_attention": lambda: {"q": samples.queries(), "k": heads(), "v": heads(), **SEGMENTS},
    "class_scores": lambda: {"q": samples.class_vectors(), "k": rows(), "cu_seqlens": LAYOUT.cu_seqlens},
    "embed_patches": lambda: {
        "images": images(), "layout": LAYOUT, "weight": torch.randn(DIM, 3, PATCH, PATCH), "bias": torch.randn(DIM),
        "pos_embed": torch.randn(CELLS, DIM), "prefix": torch.randn(PREFIX, DIM), **statistics(),
    },
    "exit_head": lambda: {
        "tokens": rows(), "norm_weight": vector(grad=False), "norm_bias": vector(grad=False), "layout": LAYOUT,
        "weight": matrix(CLASSES, grad=False), "bias": vector(CLASSES, False), "threshold": torch.tensor(0.5),
        "halted": half(), "canvas": canvas(),
    },
    "gather_tokens": lambda: {"tokens": rows(), "halting": sk.halt_tokens(rows(CLASSES), LAYOUT, 0.5)},
    "halt_tokens": lambda: {
        "scores": rows(CLASSES), "layout": LAYOUT, "threshold": torch.tensor(0.5), "values": rows(CLASSES),
        "halted": half(), "canvas": canvas(),
    },
    "masked_attention": lambda: {name: samples.dense() for name in "qkv"} | {"keep": samples.keep()},
    "merge_patches": lambda: {"images": images(), "layout": LAYOUT, "patch_size": PATCH, **statistics()},
    "merge_tokens": lambda: {
        "tokens": torch.randn(BATCH, CELLS, DIM), "layout": LAYOUT, "prefix": torch.randn(PREFIX, DIM)
    },
    "ragged_attention": lambda: {
        "q": heads(), "k": heads(), "v": heads(), "key_bias": torch.randn(ROWS), **SEGMENTS,
        "schedule": sk.attention_schedule(LAYOUT),
    },
    "ragged_layer_norm": lambda: {
        "x": rows(), "weight": vector(grad=False), "bias": vector(grad=False), "eps": 1e-6
    },
    "ragged_linear": lambda: {
        "x": rows(), "weight": matrix(CLASSES, grad=False), "bias": vector(CLASSES, False),
        "gamma": vector(CLASSES, False), "residual": rows(CLASSES),
    },
    "ragged_rope": lambda: {"q": heads(), "k": heads(), "table": rows(8)},
    "replace_prefix": lambda: {"tokens": rows(), "layout": LAYOUT, "new_prefix": torch.randn(2, DIM)},
    "resolve_layout": lambda: {"scores": [torch.rand(2, 2, 3)], "sides": (2,), "thresholds": 0.5, "grid": (4, 6)},
    "rope_table": lambda: {"layout": LAYOUT, "frequencies": torch.randn(4, 2), "phases": torch.randn(4)},
    "scatter_back": lambda: {"values": rows(), "layout": LAYOUT, "where": half()},
    "scatter_into": lambda: {"canvas": canvas(), "values": rows(CLASSES), "layout": LAYOUT, "where": half()},
    "upsample_argmax": lambda: {"canvas": canvas(), "size": (9, 9)},
}  # fmt: skip
NO_OPS = {
    "Halting",
    "SupertokenLayout",
    "UnusedAcceleratorWarning",
    "current_backend",
    "selected_backend",
    "use_backend",
}


def statistics() -> dict[str, Tensor]:
    return {"mean": samples.STATISTICS[0].clone(), "std": samples.STATISTICS[1].clone()}


def with_each_tensor(op: str, change: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The op's arguments, one of the tensors among them changed, and that one's name."""
    for name, value in CALLS[op]().items():
        if isinstance(value, (Tensor, list)):
            changed = change(value) if isinstance(value, Tensor) else [change(value[0])]
            yield name, CALLS[op]() | {name: changed}


def test_every_public_op_is_here() -> None:
    assert set(sk.__all__) - NO_OPS == set(CALLS)


def quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "nested": lambda x: torch.nested.nested_tensor([x.flatten(), x.flatten()[:1]]),
    "jagged": lambda x: torch.nested.nested_tensor([x.flatten(), x.flatten()[:1]], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "compressed sparse": lambda x: x.reshape(-1, 1).to_sparse_csr(),
    "quantised": quantised,
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore")  # what PyTorch says of its prototypes as they are made
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("op", CALLS)
def test_a_tensor_of_another_kind_is_a_type_error_that_names_the_argument(op: str, kind: str) -> None:
    for name, arguments in with_each_tensor(op, STRANGE[kind]):
        with pytest.raises(TypeError, match=rf"^{name}(\[0\]| \(.*\))?: expected .* got "):
            getattr(sk, op)(**arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", ["cu_seqlens", "cells"])
def test_a_layout_of_nested_tensors_is_refused(field: str) -> None:
    fields = {"cu_seqlens": LAYOUT.cu_seqlens, "cells": LAYOUT.cells, "grid": LAYOUT.grid}
    with pytest.raises(TypeError, match=rf"{field}: expected a dense .* got a nested tensor"):
        sk.SupertokenLayout(**fields | {field: STRANGE["nested"](fields[field])})


@pytest.mark.filterwarnings("ignore")
def test_a_subclass_that_does_not_know_the_op_is_refused_by_the_ops_name() -> None:
    """PyTorch's protocol: a subclass may implement any op, so the package refuses none by itself."""
    x = torch.masked.masked_tensor(rows(), torch.ones(ROWS, DIM, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"step_kernels\.ragged_layer_norm.*NotImplemented"):
        sk.ragged_layer_norm(x, None, None, 1e-6)


def test_a_negated_view_is_no_canvas() -> None:
    """PyTorch resolves such a view before an op sees it, so what is written in place would be lost."""
    with pytest.raises(ValueError, match="canvas: expected a tensor whose memory holds its values"):
        sk.scatter_into(torch._neg_view(canvas()), rows(CLASSES), LAYOUT)


FIRST_LEVEL = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated"
)  # PyTorch's own, of formulas it makes once


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of a result, attributes of a decision included."""
    if isinstance(value, (sk.Halting, sk.SupertokenLayout)):
        value = tuple(vars(value).values())
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [x for item in value for x in floats(item)] if isinstance(value, tuple) else []


def is_floating(arguments: dict[str, Any], name: str) -> bool:
    value = arguments[name][0] if isinstance(arguments[name], list) else arguments[name]
    return value.is_floating_point()


@FIRST_LEVEL
@pytest.mark.parametrize("op", CALLS)
def test_no_tangent_is_lost(op: str) -> None:
    """Refused by name, but for the arguments of decisions, through which there is no reverse-mode gradient either."""
    call = getattr(sk, op)
    for name, arguments in with_each_tensor(op, lambda x: x.requires_grad_() if x.is_floating_point() else x):
        if not is_floating(arguments, name):
            continue
        try:
            differentiable = any(x.requires_grad for x in floats(call(**arguments)))
        except ValueError:
            differentiable = True  # refused there, too
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), forward_ad.dual_level():
                dual = dict(with_each_tensor(op, lambda x: forward_ad.make_dual(x, x) if x.is_floating_point() else x))
                if not differentiable:
                    call(**dual[name])
                else:
                    with pytest.raises(
                        NotImplementedError, match=rf"{name}( \(.*\))?: expected a tensor without a tangent"
                    ):
                        call(**dual[name])


@FIRST_LEVEL
def test_functional_transforms_are_no_way_round() -> None:
    """As of PyTorch's own custom ops, torch.func.grad is refused; torch.func.jvp would be a silent zero."""
    x = rows()
    with pytest.raises(NotImplementedError, match="ragged_layer_norm's x: expected a tensor without a tangent"):
        torch.func.jvp(lambda x: sk.ragged_layer_norm(x, None, None, 1e-6), (x,), (x,))
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        torch.func.grad(lambda x: sk.ragged_layer_norm(x, None, None, 1e-6).sum())(x)


KEEP_THEIR_OUTPUT = (
    "class_attention",
    "masked_attention",
    "ragged_attention",
)  # for the backward pass, as PyTorch's attention does


@pytest.mark.parametrize("op", CALLS)
def test_results_may_be_written_in_place_in_training(op: str) -> None:
    arguments = CALLS[op]()
    first = next(name for name in arguments if name not in ("layout", "canvas"))
    if not isinstance(arguments[first], Tensor) or not arguments[first].is_floating_point():
        return
    leaf = arguments[first].requires_grad_()
    try:
        found = floats(getattr(sk, op)(**arguments))
    except ValueError as error:
        assert "requires no gradient" in str(error)
        return
    if not any(x.requires_grad for x in found):
        return
    (expected,) = torch.autograd.grad(found[0].relu().square().sum(), leaf, retain_graph=op in KEEP_THEIR_OUTPUT)
    out = floats(getattr(sk, op)(**arguments))[0]
    if op in KEEP_THEIR_OUTPUT:
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation|is a view and is being modified inplace"
        ):
            out.relu_().square().sum().backward()
    else:
        out.relu_().square().sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


def test_pytorchs_attention_keeps_its_output_too() -> None:
    q = samples.dense(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q).relu_().sum().backward()
