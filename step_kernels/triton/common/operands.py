"""How tensors reach a kernel: strides, the width of their loads, descriptors, the two parts of a head, the unit of scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def strides_of(x: Tensor) -> tuple[int, ...]:
    """Its strides; those of dimensions of size 1, which mean nothing, as in a contiguous tensor."""
    if 1 not in x.shape:
        return x.stride()
    found: list[int] = []
    dense = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        found.insert(0, stride if size > 1 else dense)
        dense = size * found[0]
    return tuple(found)


def vector_width(dtype: torch.dtype, strides: Iterable[int]) -> int:
    """Elements of 16 bytes where all these strides are multiples of them, else 1."""
    width = 16 // dtype.itemsize
    return width if all(stride % width == 0 for stride in strides) else 1


def describable(x: Tensor) -> bool:
    """Whether a host descriptor can stand for x: all but the last dimension at multiples of 16 bytes, none of which overlap."""
    shape, strides, size = x.shape, strides_of(x), x.element_size()
    if x.numel() == 0 or strides[-1] != 1 or x.data_ptr() % 16 or strides[0] * size >= 2**40:
        return False
    inner = shape[-1]
    for dim in range(len(shape) - 2, -1, -1):
        if strides[dim] < inner or strides[dim] * size % 16:
            return False
        inner = shape[dim] * strides[dim]
    return True


def descriptor(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A host descriptor that loads such blocks of x; what lies outside reads as zero."""
    return TensorDescriptor(x, [*x.shape], [*strides_of(x)], [*block])


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Columns of the two parts that hold a head: powers of two of at least 16, which is what a dot takes; (width, 0): one part.

    Arithmetic paid for nothing: 72 in 64 + 16 11 %, 88 in 64 + 32 9 %, 80 and 96 none, where padding to 128 would cost 78, 45, 60
    and 33 %. At worst, from 64 up, a third (97 in 128, 193 in 256).
    """
    width = max(16, triton.next_power_of_2(head_dim))
    first = width // 2
    rest = max(16, triton.next_power_of_2(max(1, head_dim - first)))
    return (width, 0) if rest >= first or head_dim == width else (first, rest)


def score_unit(dtype: torch.dtype) -> float:
    """What scores are multiplied by: 1, or log2(e) where kernels hold them in units of log2 (see ``softmax.exponential``)."""
    return 1.0 if dtype == torch.float32 else math.log2(math.e)


def dtype_class(dtype: torch.dtype) -> str:
    """What tables of tiles tell apart: fp32, and 16 bits."""
    return "float" if dtype == torch.float32 else "half"
