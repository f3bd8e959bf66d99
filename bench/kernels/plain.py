"""From a trimmed layout's two tensors to rows and cells, as a good PyTorch user would do it: no loop over images, no op of step_kernels.

Where a host sync is needed (a number of tokens per side, `nonzero`), it is part of the job, as it is for the user.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import NUM_PREFIX

LEVELS = 5  # sides 1, 2, 4, 8, 16


def prefix_rows(cu_seqlens: Tensor) -> Tensor:
    """int [B, NUM_PREFIX]"""
    return cu_seqlens[:-1, None] + torch.arange(NUM_PREFIX, device=cu_seqlens.device)


def enumerate_sides(cells: Tensor) -> list[tuple[int, Tensor]]:
    """(side, rows of the tokens that have it) for each side that occurs: one sort and one host sync for all."""
    side = cells[:, 3]
    known = 1 << torch.arange(LEVELS, dtype=torch.int32, device=cells.device)
    counts = (side[:, None] == known).sum(0).tolist()
    order = side.argsort(stable=True)
    groups = order[cells.shape[0] - sum(counts) :].split(counts)  # prefix tokens, of side 0, come first
    return [(1 << level, rows) for level, rows in enumerate(groups) if rows.shape[0]]


def cells_of_blocks(cells: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """[n, side * side], flat index of every cell of blocks of one side."""
    image, row, col = cells[:, :3].long().unbind(1)
    step = torch.arange(side, device=cells.device)
    return ((image * grid[0] + row) * grid[1] + col)[:, None] + (step[:, None] * grid[1] + step).flatten()


def covered_cells(cells: Tensor, grid: tuple[int, int], number: int | None = None) -> tuple[Tensor, Tensor]:
    """Flat index of every covered cell of the batch, and the position in `cells` of the token that covers it.

    Args:
        cells: int [n, 4].
        grid: (rows, cols).
        number: how many cells are covered, where the caller knows it; without it the device is waited for.
    """
    image, row, col, side = cells.long().unbind(1)
    area = side * side
    position = torch.repeat_interleave(area, output_size=number)
    step = torch.arange(position.shape[0], device=cells.device) - (area.cumsum(0) - area)[position]
    width = side[position]
    corner = ((image * grid[0] + row) * grid[1] + col)[position]
    return corner + step // width * grid[1] + step % width, position
