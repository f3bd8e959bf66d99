"""The PyTorch contenders of the linear layers: the vendor's matmul at exactly the live rows, and what else is element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def linear_gelu_in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In the matmul's output: no further memory. What step_kernels itself does where the host knows the live rows."""
    return torch.ops.aten.gelu_(F.linear(x, weight, bias))


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The sum in the matmul's output: no further memory."""
    return F.linear(x, weight, bias).add_(residual)


def linear_residual_by_addmm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The residual as the matmul's own addend; then the bias is what is left to add."""
    return torch.addmm(residual, x, weight.T).add_(bias)
