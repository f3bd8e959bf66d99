"""Launchers of attention within each image: forward, backward, and the schedule of their tiles.

Kernels and the reasons for them: ``attention_forward.py``, ``attention_backward.py``, ``attention_schedule.py``; block sizes: ``configs.py``.
Device kernels: 1 forward, fills included; 3 backward; 1 schedule.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...schedule import TILE_ROWS, num_tiles
from ..common.launch import OPTIONS, fp32_precision, on_device_of
from ..common.tiles import IMAGES
from . import configs
from . import schedule as schedule_kernel
from .backward import attention_delta_kernel, attention_grad_kv_kernel, attention_grad_q_kernel
from .configs import Blocks, Table
from .forward import attention_forward_kernel


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    schedule: Tensor | None,
    save_lse: bool,
    fill_tail: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_rows) if save_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    scale = head_dim**-0.5 if scale is None else scale
    with on_device_of(q):
        launch = _Launch.plan(configs.FORWARD, own=(q,), step=(k, v))
        attention_forward_kernel[launch.grid(cu_seqlens)](
            out, lse if save_lse else None, *launch.operands, key_bias, cu_seqlens, schedule,
            *launch.strides, _stride(key_bias), abs(scale) * _unit(q),
            num_heads, num_rows, cu_seqlens.shape[0] - 1,
            BLOCK_M=launch.blocks.own, BLOCK_N=launch.blocks.step, NEGATIVE=scale < 0, FILL_TAIL=fill_tail,
            **launch.settings, **OPTIONS,
        )  # fmt: skip
    return out, lse


def ragged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    schedule: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_heads, head_dim = q.shape
    grad_q, grad_k, grad_v = (q.new_empty(q.shape) for _ in range(3))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    if lse.numel() == 0:  # the registered op was called without save_lse
        lse = ragged_attention(q, k, v, cu_seqlens, scale, key_bias, schedule, True, False)[1]
    scale = head_dim**-0.5 if scale is None else scale
    delta = torch.empty_like(lse)
    metadata = (lse, delta, key_bias, cu_seqlens, schedule)
    sizes = (_stride(key_bias), scale, scale * _unit(q), num_heads, num_rows, cu_seqlens.shape[0] - 1)
    with on_device_of(q):
        _delta(delta, out, grad, cu_seqlens)
        launch = _Launch.plan(configs.GRAD_KV, own=(k, v), step=(q, grad))
        keys_last = (*launch.operands[4:], *launch.operands[:4])
        attention_grad_kv_kernel[launch.grid(cu_seqlens)](
            grad_k, grad_v, *keys_last, *metadata, *launch.strides[2:], *launch.strides[:2], *sizes,
            BLOCK_M=launch.blocks.step, BLOCK_N=launch.blocks.own, **launch.settings, **OPTIONS,
        )  # fmt: skip
        launch = _Launch.plan(configs.GRAD_Q, own=(q, grad), step=(k, v))
        attention_grad_q_kernel[launch.grid(cu_seqlens)](
            grad_q, *launch.operands, *metadata, *launch.strides, *sizes,
            BLOCK_M=launch.blocks.own, BLOCK_N=launch.blocks.step, **launch.settings, **OPTIONS,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _delta(delta: Tensor, out: Tensor, grad: Tensor, cu_seqlens: Tensor) -> None:
    num_rows, num_heads, head_dim = out.shape
    dim, rest = configs.split_head_dim(head_dim)
    block = configs.DELTA_ROWS
    attention_delta_kernel[(triton.cdiv(num_rows, block) * num_heads,)](
        delta, out, grad, cu_seqlens, _strides(out), _strides(grad), num_heads, num_rows, cu_seqlens.shape[0] - 1,
        HEAD_DIM=head_dim, DIM=dim, REST=rest, BLOCK=block, VECTOR=_vector((out, grad)),
        num_warps=configs.DELTA_WARPS, **OPTIONS,
    )  # fmt: skip


def attention_schedule(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    batch_size = cu_seqlens.shape[0] - 1
    num_entries = num_tiles(num_rows, batch_size)
    schedule = cu_seqlens.new_empty(num_entries, 4)
    if num_entries == 0:
        return schedule
    with on_device_of(cu_seqlens):
        schedule_kernel.attention_schedule_kernel[(max(batch_size, 1),)](
            schedule, cu_seqlens, batch_size, num_rows, num_entries,
            TILE=TILE_ROWS, BLOCK=schedule_kernel.BLOCK, num_warps=schedule_kernel.NUM_WARPS, **OPTIONS,
        )  # fmt: skip
    return schedule


class _Launch(NamedTuple):
    """How one kernel loads its operands: through descriptors or pointers, in which blocks."""

    operands: tuple[Any, ...]  # two per tensor, for the two parts of a head
    strides: tuple[tuple[int, int, int], ...]
    blocks: Blocks
    settings: dict[str, Any]
    num_rows: int
    num_heads: int

    @classmethod
    def plan(cls, table: Table, *, own: tuple[Tensor, ...], step: tuple[Tensor, ...]) -> _Launch:
        """``own``: tensors of which a program loads one tile; ``step``: those that its loop goes over."""
        num_rows, num_heads, head_dim = own[0].shape
        architecture = configs.architecture()
        dim, rest = configs.split_head_dim(head_dim)
        tma = configs.uses_descriptors(architecture) and all(map(_describable, (*own, *step)))
        blocks = configs.blocks(table, architecture, own[0].dtype, dim + rest)
        rows = [blocks.own] * len(own) + [blocks.step] * len(step)
        tensors = (*own, *step)
        operands = (_operand(x, size, dim, rest, tma) for x, size in zip(tensors, rows, strict=True))
        settings = {
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "REST": rest,
            "TILE": TILE_ROWS,
            "IMAGES": IMAGES,
            "TMA": tma,
            "VECTOR": _vector(tensors),
            "NATURAL": _unit(own[0]) == 1,
            "PRECISION": fp32_precision(),
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
        flat = tuple(part for operand in operands for part in operand)
        return cls(flat, tuple(map(_strides, tensors)), blocks, settings, num_rows, num_heads)

    def grid(self, cu_seqlens: Tensor) -> tuple[int]:
        tiles = num_tiles(self.num_rows, cu_seqlens.shape[0] - 1)
        return (tiles * (TILE_ROWS // self.blocks.own) * self.num_heads,)


def _unit(q: Tensor) -> float:
    """What scores are multiplied by: 1, or log2(e) where kernels hold them in units of log2 (see ``exponential``)."""
    return 1.0 if q.dtype == torch.float32 else math.log2(math.e)


def _operand(x: Tensor, rows: int, dim: int, rest: int, tma: bool) -> tuple[Any, Any]:
    """A tensor as its kernel argument, and what holds the second part of a head: a descriptor has one block shape."""
    if not tma:
        return x, None
    strides = _strides(x)
    # The padding of a part reads as zero: three dimensions keep it from running into the next head.
    parts = (TensorDescriptor(x, [*x.shape], [*strides], [rows, 1, size]) for size in (dim, rest) if size)
    first, *second = parts
    return first, second[0] if second else None


def _describable(x: Tensor) -> bool:
    """Whether a descriptor can stand for [T, H, D]: 16-byte aligned, rows that contain heads that do not overlap."""
    num_heads, head_dim = x.shape[1:]
    row, head, column = _strides(x)
    aligned = not (x.data_ptr() % 16 or row * x.element_size() % 16 or head * x.element_size() % 16)
    return aligned and column == 1 and head_dim <= head and num_heads * head <= row and row * x.element_size() < 2**40


def _vector(tensors: tuple[Tensor, ...]) -> int:
    """Elements of 16 bytes where all rows and heads start at multiples of them, else 1."""
    width = 16 // tensors[0].element_size()
    return width if all(stride % width == 0 for x in tensors for stride in _strides(x)[:2]) else 1


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Row, head and column; those of dimensions of size 1, which mean nothing, as in a contiguous tensor."""
    row, head, column = x.stride()
    num_rows, num_heads, head_dim = x.shape
    column = column if head_dim > 1 else 1
    head = head if num_heads > 1 else head_dim * column
    return row if num_rows > 1 else num_heads * head, head, column


def _stride(key_bias: Tensor | None) -> int:
    return 0 if key_bias is None else key_bias.stride(0)
