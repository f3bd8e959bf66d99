"""Reference of rotary position embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cells import live_count, with_tail


def rope_table(
    cu_seqlens: Tensor, cells: Tensor, frequencies: Tensor, phases: Tensor | None, fill_tail: bool
) -> Tensor:
    _, row, column, side = cells[: live_count(cu_seqlens, cells.shape[0])].to(frequencies.dtype)[:, :, None].unbind(1)
    middle = (side - 1) / 2
    turns = (row + middle) * frequencies[:, 0] + (column + middle) * frequencies[:, 1]
    if phases is not None:
        turns = turns + phases
    # Whole turns off first, exactly: an angle of many turns has few digits left behind its point.
    angles = 2 * math.pi * (turns - turns.round())
    angles = torch.where(side == 0, 0.0, angles)
    return with_tail(torch.cat((angles.sin(), angles.cos()), dim=1), cells.shape[0])


def ragged_rope(
    q: Tensor, k: Tensor, table: Tensor, cu_seqlens: Tensor | None, rotate_half: bool, fill_tail: bool
) -> tuple[Tensor, Tensor]:
    live = live_count(cu_seqlens, q.shape[0])
    sines, cosines = table[:live, None].chunk(2, dim=2)
    return _rotated(q, sines, cosines, rotate_half), _rotated(k, sines, cosines, rotate_half)


def ragged_rope_backward(
    grad_q: Tensor, grad_k: Tensor, table: Tensor, cu_seqlens: Tensor | None, rotate_half: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of a rotation is the rotation back."""
    sines, cosines = table[: live_count(cu_seqlens, table.shape[0]), None].chunk(2, dim=2)
    return _rotated(grad_q, -sines, cosines, rotate_half), _rotated(grad_k, -sines, cosines, rotate_half)


def _rotated(x: Tensor, sines: Tensor, cosines: Tensor, rotate_half: bool) -> Tensor:
    """x [T, H, D] with its live rows rotated, zeros behind them; sines and cosines [live, 1, D / 2]."""
    wide = x[: len(sines)].to(sines.dtype)
    rotated = wide.new_empty(wide.shape)
    (first, second), (to_first, to_second) = (
        each.chunk(2, dim=2) if rotate_half else (each[..., ::2], each[..., 1::2]) for each in (wide, rotated)
    )
    to_first.copy_(first * cosines - second * sines)
    to_second.copy_(second * cosines + first * sines)
    return with_tail(rotated.to(x.dtype), x.shape[0])
