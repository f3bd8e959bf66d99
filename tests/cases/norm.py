"""Inputs of ragged_layer_norm, and the call that the tests of its floors hold to the error rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensors import poison
from torch import Tensor

import step_kernels as sk

EPS = 1e-6


def inputs(capacity: int, live: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x with NaN past the live count, weight, bias."""
    x = 2 * torch.randn(capacity, width) + 1
    return [poison(x.to(dtype), live), torch.randn(width).to(dtype), torch.randn(width).to(dtype)]


def with_gradients(tensors: Sequence[Tensor | None], cotangent: Tensor, layout: sk.SupertokenLayout | None = None):
    """Output and the gradients of what is given."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = sk.ragged_layer_norm(*leaves, EPS, layout=layout)
    return out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], cotangent)


def large_and_shifted_rows() -> list[Tensor]:
    """Squares of 6e4 overflow fp16, and a mean far from zero cancels in E[x^2] - E[x]^2."""
    x = torch.stack([torch.linspace(-6e4, 6e4, 64), 2048 + torch.arange(64) % 2 * 2]).half()
    return [x, torch.ones(64).half(), torch.zeros(64).half()]
