"""Reference of the layout ops: decisions, compaction, the map of sides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import validate_sides
from .cells import block_view, expand_blocks_, prefix_rows


def resolve_layout(
    scores: list[Tensor],
    sides: list[int],
    thresholds: list[float],
    threshold_tensors: list[Tensor],
    rows: int,
    cols: int,
    num_prefix: int,
) -> tuple[Tensor, Tensor]:
    batch_size = scores[0].shape[0]
    decided = torch.ones(batch_size, rows, cols, dtype=torch.int32, device=scores[0].device)
    for i in sorted(range(len(sides)), key=lambda i: -sides[i]):
        threshold = threshold_tensors[i] if threshold_tensors else torch.tensor(thresholds[i])
        blocks = block_view(decided[..., None], sides[i])[..., 0]  # view [B, R, C, side, side]
        # Blocks are aligned, so a coarser one covers all of a finer one or none of it: its first cell tells.
        taken = (scores[i].float() > threshold.float()) & (blocks[..., 0, 0] == 1)
        blocks.masked_fill_(taken[..., None, None], sides[i])
    return _compacted(decided, num_prefix)


def layout_from_sides(sides: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    validate_sides(sides)  # here, not in the public function: it reads values, which torch.compile could not trace
    return _compacted(sides, num_prefix)


def _compacted(sides: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    batch_size, rows, cols = sides.shape
    sides = sides.to(torch.int32)
    row = torch.arange(rows, dtype=torch.int32, device=sides.device)[:, None]
    col = torch.arange(cols, dtype=torch.int32, device=sides.device)
    step = sides.clamp(min=1)
    is_first = (sides > 0) & (row % step == 0) & (col % step == 0)  # the top-left cell of a block
    counts = is_first.flatten(1).sum(1) + num_prefix
    cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32, device=sides.device)
    cu_seqlens[1:] = counts.cumsum(0)

    capacity = batch_size * (num_prefix + rows * cols)
    cells = torch.zeros(capacity, 4, dtype=torch.int32, device=sides.device)
    image = torch.arange(batch_size, dtype=torch.int32, device=sides.device)
    cells[prefix_rows(cu_seqlens, num_prefix), 0] = image[:, None]
    b, r, c = is_first.nonzero(as_tuple=True)  # raster order
    # b + 1 images have had their prefix tokens by the time a block of image b is placed.
    destination = torch.arange(b.shape[0], device=sides.device) + (b + 1) * num_prefix
    cells[destination] = torch.stack([b, r, c, sides[b, r, c].long()], 1).to(torch.int32)
    return cu_seqlens, cells


def layout_sides(cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int) -> Tensor:
    sides = cells.new_zeros(cu_seqlens.shape[0] - 1, rows, cols, 1)
    return expand_blocks_(sides, cells[:, 3:], cu_seqlens, cells).squeeze(3)
