"""Reference of LayerNorm on the live rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import live_count, unless_missing, with_tail


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def ragged_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, cu_seqlens: Tensor | None, fill_tail: bool
) -> Tensor:
    live = x[: live_count(cu_seqlens, x.shape[0])]
    return with_tail(layer_norm(live, weight, bias, eps).contiguous(), x.shape[0])


def ragged_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias; an empty tensor for one that is not needed."""
    live = live_count(cu_seqlens, x.shape[0])
    inputs, shape = x[:live].contiguous(), list(x.shape[1:])
    _, mean, rstd = torch.native_layer_norm(inputs, shape, weight, bias, eps)
    grads = torch.ops.aten.native_layer_norm_backward(
        grad[:live].contiguous(), inputs, shape, mean, rstd, weight, bias, needed
    )
    grad_x = with_tail(grads[0], x.shape[0]) if needed[0] else None
    return unless_missing(grad, grad_x, grads[1] if needed[1] else None, grads[2] if needed[2] else None)
