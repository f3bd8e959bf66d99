"""Inputs of ragged_linear, and the calls that the tests of its floors hold to the error rule."""

from __future__ import annotations

import torch
from tensors import poison
from torch import Tensor

import step_kernels as sk

ACTIVATIONS = (None, "gelu", "gelu_tanh")
OPTIONAL = ("bias", "gamma", "residual")


def inputs(capacity: int, live: int, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every argument for layers of so many inputs and outputs, with NaN past the live count; outputs of about one."""
    width, outputs = shape
    sizes = {"x": (capacity, width), "weight": (outputs, width), "bias": outputs, "gamma": outputs}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    tensors["weight"] /= max(1, width) ** 0.5
    tensors["residual"] = torch.randn(capacity, outputs)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return {name: poison(tensor, live) if name in ("x", "residual") else tensor for name, tensor in tensors.items()}


def forward(tensors: dict[str, Tensor], layout: sk.SupertokenLayout | None, activation: str | None = None):
    return [sk.ragged_linear(**tensors, layout=layout, activation=activation)]


def gradients(
    tensors: dict[str, Tensor], cotangent: Tensor, layout: sk.SupertokenLayout | None, activation: str | None = None
) -> tuple[Tensor, ...]:
    """Of every argument, in its order."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    return torch.autograd.grad(forward(leaves, layout, activation), tuple(leaves.values()), cotangent)


def overflowing() -> tuple[Tensor, Tensor]:
    """x and weight in fp16. Partial sums reach 1.9e7, the results are zero: fp16 accumulation would give infinity or NaN."""
    weight = torch.full((2, 64), 500.0, dtype=torch.float16)
    weight[:, 32:] = -500
    return torch.full((3, 64), 600.0, dtype=torch.float16), weight
