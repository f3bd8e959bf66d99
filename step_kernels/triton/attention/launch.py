"""Launchers of attention within each image: forward, backward, and the schedule of their tiles.

Kernels and the reasons for them: ``forward.py``, ``backward.py``, ``schedule.py``; tile sizes: ``configs.py``.
Device kernels: 1 forward, fills included; 3 backward; 1 schedule.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import attention_provider
from ...schedule import TILE_ROWS, num_tiles
from ..common import tuned
from ..common.launch import (
    OPTIONS,
    architecture,
    ceil_div,
    input_precision,
    multiprocessors,
    on_device_of,
    stride,
    uses_descriptors,
)
from ..common.operands import describable, descriptor, dtype_class, score_unit, split_head_dim, strides_of, vector_width
from ..common.remembered import Launch, launch
from ..common.tiles import IMAGES
from . import configs
from . import schedule as schedule_kernel
from .backward import attention_delta_kernel, attention_grad_kv_kernel, attention_grad_q_kernel
from .configs import Tiles
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
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    if _is_by_varlen("attention_forward", q, k, v, cu_seqlens, scale, key_bias):
        out, lse = attention_provider.forward(q, k, v, cu_seqlens, scale, fill_tail, max_seqlen)
        return out, lse if save_lse else lse.new_empty(0)
    num_rows, num_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_rows) if save_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    made, given = (out, lse if save_lse else None), (q, k, v, cu_seqlens, key_bias, schedule)
    with on_device_of(q):
        scale = head_dim**-0.5 if scale is None else scale
        launch(_forward, made, given, scale, save_lse, fill_tail, input_precision(q.dtype))
    return out, lse


def _forward(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    key_bias: Tensor | None,
    schedule: Tensor | None,
    scale: float,
    save_lse: bool,
    fill_tail: bool,
    precision: str,
) -> Launch:
    (num_rows, num_heads, _), batch_size = q.shape, cu_seqlens.shape[0] - 1
    few = has_few_programs(num_rows, batch_size, num_heads, multiprocessors(q.device))
    plan = _Plan.of("attention_forward", precision, own=(q,), step=(k, v), describe_own=False, few=few)
    arguments = (
        out, lse, q, *plan.operands[2:], key_bias, cu_seqlens, schedule,
        *plan.strides, stride(key_bias), abs(scale) * score_unit(q.dtype), num_heads, num_rows, batch_size,
    )  # fmt: skip
    named = {"BLOCK_M": plan.tiles.own, "BLOCK_N": plan.tiles.step, "NEGATIVE": scale < 0, "FILL_TAIL": fill_tail}
    return attention_forward_kernel, plan.grid(cu_seqlens), arguments, named | plan.settings


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
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_heads, head_dim = q.shape
    if q.numel() and lse.numel() == 0:  # the registered op was called without save_lse
        lse = ragged_attention(q, k, v, cu_seqlens, scale, key_bias, schedule, True, False, max_seqlen)[1]
    if _is_by_varlen("attention_backward", q, k, v, cu_seqlens, scale, key_bias):
        return attention_provider.backward(grad, q, k, v, out, lse, cu_seqlens, scale, max_seqlen)
    grad_q, grad_k, grad_v = (q.new_empty(q.shape) for _ in range(3))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    scale = head_dim**-0.5 if scale is None else scale
    delta = torch.empty_like(lse)
    metadata = (lse, delta, key_bias, cu_seqlens, schedule)
    sizes = (stride(key_bias), scale, scale * score_unit(q.dtype), num_heads, num_rows, cu_seqlens.shape[0] - 1)
    with on_device_of(q):
        precision = input_precision(q.dtype)
        _delta(delta, out, grad, cu_seqlens)
        describe_own = q.dtype == torch.float32
        plan = _Plan.of("attention_grad_kv", precision, own=(k, v), step=(q, grad), describe_own=describe_own)
        keys_last = (*plan.operands[4:], *plan.operands[:4])
        attention_grad_kv_kernel[plan.grid(cu_seqlens)](
            grad_k, grad_v, *keys_last, *metadata, *plan.strides[2:], *plan.strides[:2], *sizes,
            BLOCK_M=plan.tiles.step, BLOCK_N=plan.tiles.own, **plan.settings, **OPTIONS,
        )  # fmt: skip
        plan = _Plan.of("attention_grad_q", precision, own=(q, grad), step=(k, v), describe_own=describe_own)
        attention_grad_q_kernel[plan.grid(cu_seqlens)](
            grad_q, *plan.operands, *metadata, *plan.strides, *sizes,
            BLOCK_M=plan.tiles.own, BLOCK_N=plan.tiles.step, **plan.settings, **OPTIONS,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _is_by_varlen(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None, key_bias: Tensor | None
) -> bool:
    """Whether PyTorch's kernels compute it: named for all calls, or measured to be faster at such sizes."""
    named = attention_provider.named
    if named == "triton" or (named is None and not tuned.may_name_varlen()):
        return False
    if q.numel() == 0 or cu_seqlens.shape[0] == 1:  # nothing to attend to
        return False
    if named is None and tuned.row(q.device, *row_key(kernel, q, cu_seqlens)) != tuned.VARLEN:
        return False
    reason = attention_provider.why_not_varlen(q, k, v, scale, key_bias)
    if named == "varlen" and reason is not None:
        raise ValueError(f"environment variable STEP_KERNELS_ATTENTION is varlen, but {reason}")
    return reason is None


def row_key(kernel: str, q: Tensor, cu_seqlens: Tensor) -> tuple[object, ...]:
    """What the forward kernel's measured row, and the choice of the backward pass's kernels, are kept by."""
    num_rows, num_heads, head_dim = q.shape
    few = has_few_programs(num_rows, cu_seqlens.shape[0] - 1, num_heads, multiprocessors(q.device))
    return kernel, dtype_class(q.dtype), sum(split_head_dim(head_dim)), *["few"] * few


def _delta(delta: Tensor, out: Tensor, grad: Tensor, cu_seqlens: Tensor) -> None:
    num_rows, num_heads, head_dim = out.shape
    dim, rest = split_head_dim(head_dim)
    block = configs.DELTA_ROWS
    strides = strides_of(out), strides_of(grad)
    attention_delta_kernel[(ceil_div(num_rows, block) * num_heads,)](
        delta, out, grad, cu_seqlens, *strides, num_heads, num_rows, cu_seqlens.shape[0] - 1,
        HEAD_DIM=head_dim, DIM=dim, REST=rest, BLOCK=block, VECTOR=_vector(out.dtype, strides),
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


def has_few_programs(num_rows: int, batch_size: int, num_heads: int, multiprocessors: int) -> bool:
    return num_tiles(num_rows, batch_size) * num_heads < configs.FEW * multiprocessors


class _Plan(NamedTuple):
    """How one kernel loads its operands: through descriptors or pointers, in which tiles."""

    operands: tuple[Any, ...]  # two per tensor, for the two parts of a head
    strides: tuple[tuple[int, ...], ...]
    tiles: Tiles
    settings: dict[str, Any]
    num_rows: int
    num_heads: int

    @classmethod
    def of(
        cls,
        kernel: str,
        precision: str,
        *,
        own: tuple[Tensor, ...],
        step: tuple[Tensor, ...],
        describe_own: bool = True,
        few: bool = False,
    ) -> _Plan:
        """``own``: tensors of which a program loads one tile; ``step``: those that its loop goes over."""
        (num_rows, num_heads, head_dim), dtype = own[0].shape, own[0].dtype
        target, tensors = architecture(own[0].device), (*own, *step)
        dim, rest = split_head_dim(head_dim)
        measured = tuned.row(own[0].device, kernel, dtype_class(dtype), dim + rest, *["few"] * few)
        measured = None if measured == tuned.VARLEN else measured  # which cannot run here, or is switched off
        tiles = Tiles(*measured) if measured else configs.tiles(configs.TABLES[kernel], target, dtype, dim + rest, few)
        strides = tuple([strides_of(x) for x in tensors])
        tma = uses_descriptors(target) and all(map(describable, tensors, strides))
        operands: list[Any] = []
        for i, x in enumerate(tensors):
            rows = tiles.own if i < len(own) else tiles.step
            described = tma and (describe_own or i >= len(own))
            operands += _operand(x, strides[i], rows, dim, rest) if described else (x, None)
        settings = {
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "REST": rest,
            "TILE": TILE_ROWS,
            "IMAGES": IMAGES,
            "TMA": tma,
            "VECTOR": _vector(dtype, strides),
            "NATURAL": dtype == torch.float32,
            "PRECISION": precision,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }
        return cls(tuple(operands), strides, tiles, settings, num_rows, num_heads)

    def grid(self, cu_seqlens: Tensor) -> tuple[int]:
        tiles = num_tiles(self.num_rows, cu_seqlens.shape[0] - 1)
        return (tiles * (TILE_ROWS // self.tiles.own) * self.num_heads,)


def _operand(x: Tensor, strides: tuple[int, ...], rows: int, dim: int, rest: int) -> tuple[Any, Any]:
    """A descriptor for each part of a head: a descriptor has one block shape.

    The padding of a part reads as zero: three dimensions keep it from running into the next head.
    """
    return descriptor(x, (rows, 1, dim), strides), descriptor(x, (rows, 1, rest), strides) if rest else None


@functools.lru_cache
def _vector(dtype: torch.dtype, strides: tuple[tuple[int, ...], ...]) -> int:
    return vector_width(dtype, (stride for row, head, _ in strides for stride in (row, head)))
