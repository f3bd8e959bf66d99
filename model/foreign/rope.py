"""Axial rotary positions as what `rope_table` takes: the turns of each pair of channels per cell, and at cell 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Axes", "axial_turns", "centred_turns"]

Axes = tuple[list[Tensor], list[Tensor]]  # turns per cell and turns at cell 0, each for rows and for columns


def centred_turns(periods: Tensor, sizes: Sequence[int], offset: float = 0.0) -> Axes:
    """DINOv3: coordinates are cell centres, moved by ``offset`` cells, mapped to [-1, 1] along each axis of ``sizes`` cells."""
    return [2 / (size * periods) for size in sizes], [((1 + 2 * offset) / size - 1) / periods for size in sizes]


def axial_turns(axes: Axes, order: tuple[int, int] = (0, 1)) -> tuple[Tensor, Tensor]:
    """``frequencies`` [P, 2] and ``phases`` [P]: half of the pairs turn with rows, half with columns; ``order`` says which come first."""
    (rows, cols), phases = axes
    none = torch.zeros_like(rows)
    frequencies = [torch.stack((rows, none), 1), torch.stack((none, cols), 1)]
    return torch.cat([frequencies[axis] for axis in order]), torch.cat([phases[axis] for axis in order])
