"""Registration of ops with torch.library: schema, implementation on every device, fake, autograd.

``define`` + ``impl`` rather than ``custom_op``: half the host cost per call. The schemas hold tensors and numbers only; the public
functions unpack layouts before they call a registered op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import backend

NAMESPACE = "step_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_schemas: dict[str, str] = {}
_modules: dict[str, str] = {}


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
    _library.define(schema)
    _library.impl(name, backend.implementation(module, name), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    _schemas[name], _modules[name] = schema, module
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None and name.endswith("_backward"):
        backward = _refuse_double_backward(name)
    if backward is None:
        return op
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return _past_autograd(op)


def _past_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, spared a detour where gradients are off: the wrapper of ``register_autograd``, in Python, takes longer than the dispatcher."""

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():  # what that wrapper then does
            return op(*args)

    return call


def defined_ops() -> dict[str, str]:
    """Name -> schema of every registered op."""
    return dict(_schemas)


def module_of(name: str) -> str:
    """The module of either floor that holds a registered op's function."""
    return _modules[name]


def _refuse_double_backward(name: str) -> Callable[..., Any]:
    forward = name.removesuffix("_backward")

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"step_kernels.{forward}: double backward (a gradient of its gradient) is not supported"
        )

    return refuse
