"""Every op in the dispatcher passes opcheck, and a gradient of its gradient is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import samples
import torch
from layouts import build
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import step_kernels as sk
from step_kernels.library import schemas


def dispatcher_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.partition("::")[2].partition(".")[0] for name in names if name.startswith("step_kernels::")})


def test_every_op_has_a_sample() -> None:
    assert dispatcher_names() == sorted(samples.SAMPLES)


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.step_kernels, name).default
    for arguments in samples.SAMPLES[name]():
        torch.library.opcheck(op, arguments)


def test_every_size_in_a_schema_may_be_a_symbol() -> None:
    """As a plain int it would compile once for each of its values."""
    plain = {name for schema in schemas.values() for name in re.findall(r"\bint(?:\[\])?\?? (\w+)", schema)}
    assert plain == {"keep_per_class", "sides"}, "a setting, and blocks' sides, which are chosen from a list"


LAYOUT = build(samples.PLAIN)
LIVE = LAYOUT.capacity
DIFFERENTIABLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]] = {
    "merge_patches": (lambda x: sk.merge_patches(x, LAYOUT, samples.PATCH), samples.images),
    "embed_patches": (lambda x: sk.embed_patches(x, LAYOUT, samples.parameters(False)[0]), samples.images),
    "merge_tokens": (
        lambda x: sk.merge_tokens(x, LAYOUT),
        lambda: torch.randn(samples.BATCH, samples.CELLS, samples.DIM),
    ),
    "scatter_back": (lambda x: sk.scatter_back(x, LAYOUT), lambda: torch.randn(LIVE, samples.DIM)),
    "gather_tokens": (
        lambda x: sk.gather_tokens(x, sk.halt_tokens(x, LAYOUT, 0.5)),
        lambda: torch.randn(LIVE, samples.DIM),
    ),
    "replace_prefix": (
        lambda x: sk.replace_prefix(x, LAYOUT, samples.matrix(1))[0],
        lambda: torch.randn(LIVE, samples.DIM),
    ),
    "ragged_attention": (
        lambda x: sk.ragged_attention(x, x, x, LAYOUT.cu_seqlens, LAYOUT.max_seqlen),
        lambda: torch.randn(LIVE, 2, 4),
    ),
    "masked_attention": (
        lambda x: sk.masked_attention(x, x, x, samples.keep()),
        lambda: torch.randn(samples.BATCH, 2, 9, 4),
    ),
    "class_attention": (
        lambda x: sk.class_attention(torch.ones(samples.BATCH, 3, 2, 4), x, x, LAYOUT.cu_seqlens, LAYOUT.max_seqlen),
        lambda: torch.randn(LIVE, 2, 4),
    ),
    "class_scores": (
        lambda x: sk.class_scores(torch.ones(samples.BATCH, 3, samples.DIM), x, LAYOUT.cu_seqlens),
        lambda: torch.randn(LIVE, samples.DIM),
    ),
    "ragged_rope": (
        lambda x: sk.ragged_rope(x, x, torch.ones(LIVE, 4))[0],
        lambda: torch.randn(LIVE, 2, 4),
    ),
    "ragged_layer_norm": (
        lambda x: sk.ragged_layer_norm(x, samples.vector(grad=False), None, 1e-6),
        lambda: torch.randn(LIVE, samples.DIM),
    ),
    "ragged_linear": (
        lambda x: sk.ragged_linear(x, samples.matrix(3, grad=False)),
        lambda: torch.randn(LIVE, samples.DIM),
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_is_refused(name: str) -> None:
    """A missing second derivative must not pass for a zero."""
    call, make = DIFFERENTIABLE[name]
    x = make().requires_grad_()
    (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="double backward"):
        torch.autograd.grad(gradient.square().sum(), x)


class Names(TorchDispatchMode):
    """Of the ops that a mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_op_is_dispatched_whether_or_not_gradients_are_on(name: str, gradients: type) -> None:
    """So that modes (fake tensors, counters of FLOPs) and profiles see it; there is a gradient only where they are on."""
    call, make = DIFFERENTIABLE[name]
    x = make().requires_grad_()
    with gradients(), Names() as names:
        result = call(x)
    assert f"step_kernels::{name}" in names.seen
    assert result.requires_grad is (gradients is torch.enable_grad)


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
def test_fake_tensors_stay_fake(gradients: type) -> None:
    with FakeTensorMode(), gradients():
        result = sk.ragged_layer_norm(torch.empty(5, samples.DIM), None, None, 1e-6)
    assert isinstance(result, FakeTensor) and result.shape == (5, samples.DIM)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_nothing_but_the_dispatcher_is_passed_over(name: str) -> None:
    """Without gradients, where nobody looks on: the same values."""
    call, make = DIFFERENTIABLE[name]
    x = make()
    with torch.no_grad():
        torch.manual_seed(0)  # the other arguments
        direct = call(x)
        torch.manual_seed(0)
        with Names() as names:
            dispatched = call(x)
    assert f"step_kernels::{name}" in names.seen
    torch.testing.assert_close(direct, dispatched, rtol=0, atol=0)


class Marked(Tensor):
    """A subclass that notes which ops it meets."""

    seen: list[str] = []  # noqa: RUF012
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        return torch.zeros(())


def norm(x: Tensor) -> Tensor:
    return sk.ragged_layer_norm(x, None, None, 1e-6)


@torch.no_grad()
def test_whoever_waits_for_an_op_sees_it() -> None:
    """A profiler, a subclass, a tracer, a transform; meta tensors have the fake, negated views the values."""
    x = torch.randn(3, samples.DIM)
    with torch.autograd.profiler.profile() as profile:
        norm(x)
    assert "step_kernels::ragged_layer_norm" in {event.name for event in profile.function_events}
    norm(x.as_subclass(Marked))
    assert Marked.seen == ["step_kernels::ragged_layer_norm"]
    for pre_dispatch in (False, True):
        graph = make_fx(norm, pre_dispatch=pre_dispatch)(x).graph
        assert any("ragged_layer_norm" in str(node.target) for node in graph.nodes)
    assert norm(x.to("meta")).is_meta
    negated = torch._neg_view(x)
    assert negated.is_neg()
    torch.testing.assert_close(norm(negated), norm(-x))
    torch.testing.assert_close(torch.vmap(lambda row: norm(row[None])[0])(x), norm(x))
