"""How tensors reach a kernel: strides, the width of their loads, descriptors, the two parts of a head, the unit of scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import power_of_2


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


def describable(x: Tensor, strides: tuple[int, ...] | None = None) -> bool:
    """Whether a host descriptor can stand for x: it starts at a multiple of 16 bytes, and its strides are as cuda.h wants them.

    That is ``globalStrides`` of cuTensorMapEncodeTiled: multiples of 16 bytes, each a multiple of the one before, from the last
    dimension on, and not below what that reaches. ``strides``: those of ``strides_of``, where a caller has them already.
    """
    strides = strides_of(x) if strides is None else strides
    return x.data_ptr() % 16 == 0 and x.numel() > 0 and _describable(x.shape[1:], strides, x.element_size())


@functools.lru_cache  # of all but the number of rows, which differs from batch to batch
def _describable(inner: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    if strides[-1] != 1 or strides[0] * size >= 2**40:
        return False
    reach, below = inner[-1], 1
    for stride, length in zip(strides[-2::-1], (*inner[-2::-1], 1), strict=True):
        if stride < reach or stride * size % 16 or stride % below:
            return False
        reach, below = length * stride, stride
    return True


class Descriptor(TensorDescriptor):
    """Spared Triton's checks, which ``describable`` has made, and cheaper."""

    def __post_init__(self) -> None: ...


def descriptor(x: Tensor, block: Sequence[int], strides: Sequence[int] | None = None) -> TensorDescriptor:
    """A host descriptor that loads such blocks of a ``describable`` x; what lies outside reads as zero."""
    return Descriptor(x, [*x.shape], [*(strides_of(x) if strides is None else strides)], [*block])


@functools.cache
def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Columns of the two parts that hold a head: powers of two of at least 16, which is what a dot takes; (width, 0): one part.

    Arithmetic paid for nothing: 72 in 64 + 16 11 %, 88 in 64 + 32 9 %, 80 and 96 none, where padding to 128 would cost 78, 45, 60
    and 33 %. At worst, from 64 up, a third (97 in 128, 193 in 256).
    """
    width = max(16, power_of_2(head_dim))
    first = width // 2
    rest = max(16, power_of_2(max(1, head_dim - first)))
    return (width, 0) if rest >= first or head_dim == width else (first, rest)


def score_unit(dtype: torch.dtype) -> float:
    """What scores are multiplied by: 1, or log2(e) where kernels hold them in units of log2 (see ``softmax.exponential``)."""
    return 1.0 if dtype == torch.float32 else math.log2(math.e)


def dtype_class(dtype: torch.dtype) -> str:
    """What tables of tiles tell apart: fp32, and 16 bits."""
    return "float" if dtype == torch.float32 else "half"
