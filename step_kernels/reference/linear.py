"""Reference of the linear layer with its epilogue, on the live rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import live_count, unless_missing, with_tail

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    fill_tail: bool,
    expected_tokens: int | None,
) -> Tensor:
    rows = x.shape[0]
    if cu_seqlens is not None:
        live = live_count(cu_seqlens, rows)
        x, residual = x[:live], None if residual is None else residual[:live]
    return with_tail(linear_of_all_rows(x, weight, bias, activation, gamma, residual), rows)


def linear_of_all_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Where every row is live, on every floor. No gradient."""
    out = F.linear(x, weight, bias)
    if activation is not None:
        torch._C._nn.gelu_(out, approximate=APPROXIMATE[activation])  # type: ignore[attr-defined]  # no second tensor of that size
    if gamma is not None:
        out *= gamma
    if residual is not None:
        out += residual
    return out


def ragged_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, gamma and residual; an empty tensor for one that is not needed."""
    capacity = x.shape[0]
    live = live_count(cu_seqlens, capacity)
    grad, x = grad[:live], x[:live]
    grad_gamma = None
    pre = F.linear(x, weight, bias) if activation is not None or needed[3] else grad
    if needed[3]:
        activated = pre if activation is None else F.gelu(pre, approximate=APPROXIMATE[activation])
        grad_gamma = (grad * activated).sum(0)
    inner = grad if gamma is None else grad * gamma
    if activation is not None:
        inner = torch.ops.aten.gelu_backward(inner, pre, approximate=APPROXIMATE[activation])
    return unless_missing(
        grad,
        with_tail(inner @ weight, capacity) if needed[0] else None,
        inner.T @ x if needed[1] else None,
        inner.sum(0) if needed[2] else None,
        grad_gamma,
        with_tail(grad, capacity).clone() if needed[4] else None,
    )
