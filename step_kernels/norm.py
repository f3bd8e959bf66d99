"""LayerNorm on the live rows of packed tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Tail, check_number, check_optional, check_tail
from .layout import SupertokenLayout
from .library import define, empty_of, those
from .packed import check_rows


def ragged_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    layout: SupertokenLayout | None = None,
    tail: Tail = "zero",
) -> Tensor:
    """LayerNorm over the last dimension, for the rows up to the live count. Differentiable in x, weight and bias.

    Equivalent PyTorch: ``F.layer_norm(x, (D,), weight, bias, eps)``.

    Args:
        x: [T, D], floating point.
        weight, bias: [D] or None.
        eps: added to the variance.
        layout: the tokens' layout, whose capacity is T. None: all rows are live.
        tail: rows past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        [T, D] in x's dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    cu_seqlens = check_rows("x", x, ("T", "D"), layout)
    shape = (x.shape[1],)
    check_optional("weight", weight, shape, like=x, like_name="x")
    check_optional("bias", bias, shape, like=x, like_name="x")
    return unchecked_layer_norm(x, weight, bias, check_number("eps", eps, minimum=0), cu_seqlens, check_tail(tail))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, eps, cu_seqlens, _ = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens)
    ctx.eps = eps


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, cu_seqlens = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    grads = _ragged_layer_norm_backward(grad, x, weight, bias, ctx.eps, cu_seqlens, needed)
    return *those(needed, grads), None, None, None


_ragged_layer_norm_backward = define(
    "ragged_layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? cu_seqlens, "
    "bool[] needed) -> (Tensor, Tensor, Tensor)",
    module="norm",
    fake=lambda grad, x, *rest: empty_of(rest[-1], grad, (x.shape, x.shape[1:], x.shape[1:])),
)
unchecked_layer_norm = define(  # for callers whose tensors fit by the way they were made
    "ragged_layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? cu_seqlens, bool fill_tail) -> Tensor",
    module="norm",
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    setup_context=_setup,
    backward=_gradients,
)
