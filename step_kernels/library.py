"""Registration of ops with torch.library: schema, implementation on every device, fake, autograd.

``define`` + ``impl`` rather than ``custom_op``: half the host cost per call. The schemas hold tensors and numbers only; the public
functions unpack layouts before they call a registered op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from . import backend
from .checks import check_no_tangent

NAMESPACE = "step_kernels"
# What every call of this thread is dispatched through besides its tensors' own keys, where nothing special goes on; the first under inference_mode.
_NO_MODES = [DispatchKeySet(DispatchKey.BackendSelect).raw_repr()]
_NO_MODES += [(DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr()]
_PLAIN = (Tensor, nn.Parameter)

_library = torch.library.Library(NAMESPACE, "DEF")
schemas: dict[str, str] = {}  # of each registered op
op_modules: dict[str, str] = {}  # of either floor, where its function is


def define(
    schema: str,
    *,
    module: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``step_kernels::<schema>``, implemented by the function of the same name in each floor's ``module``.

    An op without ``backward`` has no gradient: the public functions detach what goes into it, or refuse inputs that require one.

    Returns:
        What calls the op's default overload.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    implementation = backend.implementation(module, name)
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    schemas[name], op_modules[name] = schema, module
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None and name.endswith("_backward"):
        backward = _refuse_double_backward(name)
    if backward is None:
        return op
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return _by_the_shortest_way(name, op, implementation)


def _by_the_shortest_way(name: str, op: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, past what only gradients and onlookers need: on the host that takes longer than all the rest of a call."""

    names = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            for argument, value in zip(names, args, strict=False):
                check_no_tangent(f"{name}'s {argument}", value)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        if unobserved() and all_plain(args):
            return implementation(*args)  # past the dispatcher, which would call nothing else
        with torch._C._AutoDispatchBelowAutograd():  # what the wrapper of ``register_autograd``, in Python, then does
            return op(*args)

    return call


def empty_of(needed: Sequence[bool], like: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Room for the gradients that are needed; no entries for the others, as an op returns tensors only."""
    return tuple(like.new_empty(shape if want else (0,)) for want, shape in zip(needed, shapes, strict=True))


def those(needed: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of an op's gradients the ones that are needed, as autograd takes them."""
    return tuple(each if want else None for want, each in zip(needed, gradients, strict=True))


def unobserved() -> bool:
    """Whether nothing may be waiting for calls of ops: no mode, transform, tracer or profiler."""
    included = torch._C._dispatch_tls_local_include_set().raw_repr()
    return included in _NO_MODES and not (
        torch._C._is_torch_function_mode_enabled()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def all_plain(args: Sequence[Any]) -> bool:
    """Whether all tensors among an op's arguments are just that: no fake, distributed or other subclass, no meta tensor, no view to be negated."""
    for argument in args:
        if isinstance(argument, Tensor):
            if type(argument) not in _PLAIN or argument.is_meta or argument.is_neg():
                return False
        elif isinstance(argument, (list, tuple)) and not all_plain(argument):
            return False
    return True


def _refuse_double_backward(name: str) -> Callable[..., Any]:
    forward = name.removesuffix("_backward")

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"step_kernels.{forward}: double backward (a gradient of its gradient) is not supported"
        )

    return refuse
