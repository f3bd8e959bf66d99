"""Launchers of ``cross_attention.py`` and its gradients: operands as the kernels want them, block sizes, grids."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..attention import configs
from ..attention.configs import Blocks
from ..common.launch import OPTIONS, fp32_precision
from ..common.tiles import IMAGES
from .backward import grad_keys_kernel, grad_queries_kernel
from .forward import cross_attention_kernel

# Block sizes per matmul class: (widest head in columns, sizes). None of it has been measured on a GPU yet: chosen ahead of time, so that
# shared memory fits every architecture and forward kernels spill nothing (backward: at most 64 bytes), but for float32 heads of more than
# 128 columns (backward: 64).
# "shared": wgmma and tcgen05 read operands from shared memory; "registers": mma.sync holds them in registers, so tiles are smaller.
Sizes = tuple[tuple[int, Blocks], ...]
# Each thread of a float32 matmul without tensor cores holds whole rows of both operands: few rows, many threads.
FLOAT: Sizes = ((256, Blocks(16, 16, 8, 2)),)
FORWARD: dict[str, Sizes] = {
    "shared": ((128, Blocks(128, 64, 8, 2)), (256, Blocks(64, 32, 8, 2))),
    "registers": ((96, Blocks(128, 64, 8, 2)), (128, Blocks(64, 32, 8, 2)), (256, Blocks(32, 32, 8, 2))),
}
# Class queries are few: lower tiles leave less of the last one empty and make more programs.
FORWARD_FEW: dict[str, Sizes] = {
    "shared": ((128, Blocks(64, 64, 4, 2)), (256, Blocks(64, 32, 8, 2))),
    "registers": ((80, Blocks(64, 32, 4, 2)), (128, Blocks(32, 32, 4, 2)), (256, Blocks(32, 32, 8, 2))),
}
GRAD_QUERIES: dict[str, Sizes] = {
    "shared": ((64, Blocks(64, 64, 4, 2)), (128, Blocks(64, 32, 4, 2)), (256, Blocks(64, 32, 8, 2))),
    "registers": (
        (64, Blocks(32, 32, 4, 2)), (80, Blocks(64, 32, 8, 2)), (96, Blocks(32, 16, 4, 2)), (128, Blocks(32, 32, 8, 2)),
        (256, Blocks(16, 16, 8, 2)),
    ),
}  # fmt: skip
GRAD_KEYS: dict[str, Sizes] = {
    "shared": ((64, Blocks(64, 32, 4, 2)), (128, Blocks(64, 32, 8, 2)), (256, Blocks(16, 16, 8, 2))),
    "registers": (
        (64, Blocks(32, 32, 4, 2)), (96, Blocks(32, 16, 4, 2)), (128, Blocks(32, 32, 8, 2)), (256, Blocks(16, 16, 8, 2)),
    ),
}  # fmt: skip


class Operand(NamedTuple):
    """A tensor and its strides: row, head, column, image."""

    tensor: Tensor
    strides: tuple[int, int, int, int]


class Rows(NamedTuple):
    """Which rows of an image take part: by index, or all queries against the segments of a packed tensor."""

    batch_size: int
    num_queries: int  # rows of the query tensor per image
    rows: Tensor | None = None
    counts: Tensor | None = None
    gather_keys: bool = False
    cu_seqlens: Tensor | None = None


def operand(x: Tensor, row: int, head: int | None, image: int | None) -> Operand:
    """``row``, ``head``, ``image``: the dimensions that these are. A stride of a dimension of size 1 means nothing: 0."""
    row, head, image = (x.stride(i) if i is not None and x.shape[i] > 1 else 0 for i in (row, head, image))
    return Operand(x, (row, head, x.stride(-1) if x.shape[-1] > 1 else 1, image))


def attend(
    out: Tensor, lse: Tensor | None, q: Operand, k: Operand, v: Operand, where: Rows, num_heads: int, scale: float
) -> None:
    """Write ``out`` [B, num_queries, H, D], contiguous, and ``lse`` [B, H, num_queries]."""
    blocks, settings = _plan(FORWARD if where.rows is not None else FORWARD_FEW, q, k, v)
    programs = where.batch_size * triton.cdiv(where.num_queries, blocks.own) * num_heads
    cross_attention_kernel[(programs,)](
        out, lse, q.tensor, k.tensor, v.tensor, where.rows, where.counts, where.cu_seqlens,
        q.strides, k.strides, v.strides, abs(scale) * _unit(out), num_heads, where.num_queries,
        GATHER=where.gather_keys, NEGATIVE=scale < 0, BLOCK_M=blocks.own, BLOCK_N=blocks.step, **settings, **OPTIONS,
    )  # fmt: skip


def gradients(
    grads: tuple[Tensor, Tensor, Tensor],
    q: Operand,
    k: Operand,
    v: Operand,
    out: Operand,
    grad: Operand | None,
    grad_scores: Tensor | None,
    lse: Tensor,
    where: Rows,
    num_heads: int,
    scale: float,
    fill_tail: bool = True,
) -> None:
    """Write the gradients of q [B, num_queries, H, D] and of k and v, [B, num_queries, H, D] or [T, H, D]; all contiguous."""
    delta = torch.empty_like(lse)
    cotangent = (None, (0, 0, 0, 0)) if grad is None else grad
    score_strides = (0, 0) if grad_scores is None else grad_scores.stride()
    operands = (q, k, v, out) if grad is None else (q, k, v, out, grad)
    metadata = (where.rows, where.counts, where.cu_seqlens)
    sizes = (scale, scale * _unit(q.tensor), num_heads, where.num_queries)
    if where.batch_size * where.num_queries:
        blocks, settings = _plan(GRAD_QUERIES, *operands)
        programs = where.batch_size * triton.cdiv(where.num_queries, blocks.own) * num_heads
        grad_queries_kernel[(programs,)](
            grads[0], delta, q.tensor, k.tensor, v.tensor, out.tensor, cotangent[0], grad_scores, lse, *metadata,
            q.strides, k.strides, v.strides, out.strides, cotangent[1], score_strides, *sizes,
            GATHER=where.gather_keys, BLOCK_M=blocks.own, BLOCK_N=blocks.step, **settings, **OPTIONS,
        )  # fmt: skip
    num_keys = k.tensor.shape[0] if where.cu_seqlens is not None else where.num_queries
    blocks, settings = _plan(GRAD_KEYS, *operands)
    tiles = triton.cdiv(num_keys, blocks.own)
    tiles = tiles + where.batch_size if where.cu_seqlens is not None else tiles * where.batch_size
    if num_keys and tiles:
        grad_keys_kernel[(tiles * num_heads,)](
            grads[1], grads[2], q.tensor, k.tensor, v.tensor, cotangent[0], grad_scores, lse, delta, *metadata,
            q.strides, k.strides, v.strides, cotangent[1], score_strides, *sizes, num_keys, where.batch_size,
            GATHER=where.gather_keys, FILL_TAIL=fill_tail, BLOCK_M=blocks.step, BLOCK_N=blocks.own, IMAGES=IMAGES,
            **settings, **OPTIONS,
        )  # fmt: skip


def _plan(table: dict[str, Sizes], *operands: Operand) -> tuple[Blocks, dict[str, Any]]:
    """Block sizes and the constants that every kernel takes."""
    head_dim, dtype = operands[0].tensor.shape[-1], operands[0].tensor.dtype
    dim, rest = configs.split_head_dim(head_dim)
    rows = FLOAT if dtype == torch.float32 else table[_matmul_class()]
    blocks = next(row for limit, row in rows if dim + rest <= limit)
    settings = {
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "REST": rest,
        "VECTOR": vector(operands),
        "NATURAL": dtype == torch.float32,
        "PRECISION": fp32_precision(),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    return blocks, settings


def _unit(x: Tensor) -> float:
    """What scores are multiplied by for the exponential of their dtype's kernels: see ``attention_forward.exponential``."""
    return 1.0 if x.dtype == torch.float32 else math.log2(math.e)


def _matmul_class() -> str:
    """Where matmul instructions of the current target find their operands."""
    wide = configs.architecture_class(configs.architecture()) in ("hopper", "blackwell")
    return "shared" if wide else "registers"


def vector(operands: tuple[Operand, ...]) -> int:
    """Elements of 16 bytes where all rows, heads and images start at multiples of them, else 1."""
    width = 16 // operands[0].tensor.element_size()
    return width if all(x.strides[i] % width == 0 for x in operands for i in (0, 1, 3)) else 1
