"""Launchers of ``forward.py`` and ``backward.py``: operands as the kernels want them, tile sizes, grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.configs import Tiles
from ..common.launch import OPTIONS, architecture, ceil_div, input_precision, uses_descriptors
from ..common.operands import score_unit, split_head_dim, vector_width
from ..common.tiles import IMAGES
from .backward import grad_keys_kernel, grad_queries_kernel
from .forward import cross_attention_kernel

# Tile sizes per matmul class: (widest head in columns, sizes). None of it has been measured on a GPU yet: chosen ahead of time, so that
# shared memory fits every architecture and forward kernels spill nothing (backward: at most 64 bytes), but for float32 heads of more than
# 128 columns (backward: 64).
# "shared": wgmma and tcgen05 read operands from shared memory; "registers": mma.sync holds them in registers, so tiles are smaller.
Sizes = tuple[tuple[int, Tiles], ...]
# Each thread of a float32 matmul without tensor cores holds whole rows of both operands: few rows, many threads.
FLOAT: Sizes = ((256, Tiles(16, 16, 8, 2)),)
FORWARD: dict[str, Sizes] = {
    "shared": ((128, Tiles(128, 64, 8, 2)), (256, Tiles(64, 32, 8, 2))),
    "registers": ((96, Tiles(128, 64, 8, 2)), (128, Tiles(64, 32, 8, 2)), (256, Tiles(32, 32, 8, 2))),
}
# Class queries are few: lower tiles leave less of the last one empty and make more programs.
FORWARD_FEW: dict[str, Sizes] = {
    "shared": ((128, Tiles(64, 64, 4, 2)), (256, Tiles(64, 32, 8, 2))),
    "registers": ((80, Tiles(64, 32, 4, 2)), (128, Tiles(32, 32, 4, 2)), (256, Tiles(32, 32, 8, 2))),
}
GRAD_QUERIES: dict[str, Sizes] = {
    "shared": ((64, Tiles(64, 64, 4, 2)), (128, Tiles(64, 32, 4, 2)), (256, Tiles(64, 32, 8, 2))),
    "registers": (
        (64, Tiles(32, 32, 4, 2)), (80, Tiles(64, 32, 8, 2)), (96, Tiles(32, 16, 4, 2)), (128, Tiles(32, 32, 8, 2)),
        (256, Tiles(16, 16, 8, 2)),
    ),
}  # fmt: skip
GRAD_KEYS: dict[str, Sizes] = {
    "shared": ((64, Tiles(64, 32, 4, 2)), (128, Tiles(64, 32, 8, 2)), (256, Tiles(16, 16, 8, 2))),
    "registers": (
        (64, Tiles(32, 32, 4, 2)), (96, Tiles(32, 16, 4, 2)), (128, Tiles(32, 32, 8, 2)), (256, Tiles(16, 16, 8, 2)),
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

    def num_keys(self, k: Operand) -> int:
        """Rows of the key tensor, per image where it has images."""
        return self.num_queries if self.cu_seqlens is None else k.tensor.shape[0]


def operand(x: Tensor, row: int, head: int | None, image: int | None) -> Operand:
    """``row``, ``head``, ``image``: the dimensions that these are. A stride of a dimension of size 1 means nothing: 0."""
    row, head, image = (x.stride(i) if i is not None and x.shape[i] > 1 else 0 for i in (row, head, image))
    return Operand(x, (row, head, x.stride(-1) if x.shape[-1] > 1 else 1, image))


def launch_forward(
    out: Tensor, lse: Tensor | None, q: Operand, k: Operand, v: Operand, where: Rows, num_heads: int, scale: float
) -> None:
    """Write ``out`` [B, num_queries, H, D], contiguous, and ``lse`` [B, H, num_queries]."""
    tiles, settings = _plan(FORWARD if where.rows is not None else FORWARD_FEW, q, k, v)
    programs = where.batch_size * ceil_div(where.num_queries, tiles.own) * num_heads
    cross_attention_kernel[(programs,)](
        out, lse, q.tensor, k.tensor, v.tensor, where.rows, where.counts, where.cu_seqlens,
        q.strides, k.strides, v.strides, abs(scale) * score_unit(out.dtype), num_heads, where.num_queries,
        where.num_keys(k),
        GATHER=where.gather_keys, NEGATIVE=scale < 0, BLOCK_M=tiles.own, BLOCK_N=tiles.step, **settings, **OPTIONS,
    )  # fmt: skip


def launch_backward(
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
    num_keys = where.num_keys(k)
    sizes = (scale, scale * score_unit(q.tensor.dtype), num_heads, where.num_queries, num_keys)
    if where.batch_size * where.num_queries:
        tiles, settings = _plan(GRAD_QUERIES, *operands)
        programs = where.batch_size * ceil_div(where.num_queries, tiles.own) * num_heads
        grad_queries_kernel[(programs,)](
            grads[0], delta, q.tensor, k.tensor, v.tensor, out.tensor, cotangent[0], grad_scores, lse, *metadata,
            q.strides, k.strides, v.strides, out.strides, cotangent[1], score_strides, *sizes,
            GATHER=where.gather_keys, BLOCK_M=tiles.own, BLOCK_N=tiles.step, **settings, **OPTIONS,
        )  # fmt: skip
    tiles, settings = _plan(GRAD_KEYS, *operands)
    count = ceil_div(num_keys, tiles.own)
    count = count + where.batch_size if where.cu_seqlens is not None else count * where.batch_size
    if num_keys and count:
        grad_keys_kernel[(count * num_heads,)](
            grads[1], grads[2], q.tensor, k.tensor, v.tensor, cotangent[0], grad_scores, lse, delta, *metadata,
            q.strides, k.strides, v.strides, cotangent[1], score_strides, *sizes, where.batch_size,
            GATHER=where.gather_keys, FILL_TAIL=fill_tail, BLOCK_M=tiles.step, BLOCK_N=tiles.own, IMAGES=IMAGES,
            **settings, **OPTIONS,
        )  # fmt: skip


def _plan(table: dict[str, Sizes], *operands: Operand) -> tuple[Tiles, dict[str, Any]]:
    """Tile sizes and the constants that every kernel takes."""
    head_dim, dtype = operands[0].tensor.shape[-1], operands[0].tensor.dtype
    dim, rest = split_head_dim(head_dim)
    operands_in = "shared" if uses_descriptors(architecture(operands[0].tensor.device)) else "registers"  # of matmuls
    rows = FLOAT if dtype == torch.float32 else table[operands_in]
    tiles = next(row for limit, row in rows if dim + rest <= limit)
    settings = {
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "REST": rest,
        "VECTOR": operands_width(operands),
        "NATURAL": dtype == torch.float32,
        "PRECISION": input_precision(dtype),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return tiles, settings


def operands_width(operands: tuple[Operand, ...]) -> int:
    """Elements that one load takes at a time: those of 16 bytes where all rows, heads and images start at multiples of them."""
    return vector_width(operands[0].tensor.dtype, (x.strides[i] for x in operands for i in (0, 1, 3)))
