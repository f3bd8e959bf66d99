"""Recorded decisions as the boolean masks that eager code works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step_kernels.model import Trace

from ..model.layouts import NUM_PREFIX, gone_at


@dataclass(frozen=True)
class Masks:
    """Decisions on one batch, or on one image of it, tokens in the peers' order: class token, then side by side, in raster order.

    Attributes:
        blocks: side -> bool [B, rows // side, cols // side]: which blocks of that side are tokens.
        counts: tokens of each side in every one of these images.
        halted: number of the block before the exit -> bool [B, tokens]: who leaves there.
    """

    blocks: dict[int, Tensor]
    counts: tuple[int, ...]
    halted: dict[int, Tensor]

    @property
    def images(self) -> int:
        return next(iter(self.blocks.values())).shape[0]


@dataclass(frozen=True)
class Decisions:
    """Decisions on one input.

    Attributes:
        groups: the images that go on together, in the batch's order.
        blocks: as in `Masks`, of the whole batch.
    """

    groups: tuple[Masks, ...]
    blocks: dict[int, Tensor]


def decisions_of(groups: Sequence[Masks]) -> Decisions:
    """The groups and what holds for all of them at once."""
    sides = groups[0].blocks
    return Decisions(tuple(groups), {side: torch.cat([one.blocks[side] for one in groups]) for side in sides})


def masks_of(trace: Trace, sides: tuple[int, ...], images: slice) -> Masks | None:
    """The decisions on these images as masks; None where not every image has equally many tokens of each side."""
    covered = trace.layout.sides()[images]
    blocks = {side: corners(covered, side) == side for side in sides}
    per_image = torch.stack([mask.flatten(1).sum(1) for mask in blocks.values()], 1)
    if not torch.equal(per_image, per_image[:1].expand_as(per_image)):
        return None
    counts = tuple(per_image[0].tolist())
    halted = {}
    for stage in trace.stages:
        gone = gone_at(trace, stage)[images]
        parts = [gone.new_zeros(gone.shape[0], NUM_PREFIX)]
        for (side, mask), count in zip(blocks.items(), counts, strict=True):
            parts.append(corners(gone, side)[mask].view(gone.shape[0], count))
        halted[stage.block] = torch.cat(parts, 1)
    return Masks(blocks, counts, halted)


def corners(cells: Tensor, side: int) -> Tensor:
    """[B, rows, cols, ...] -> [B, rows // side, cols // side, ...]: what stands in the top left cell of each whole block."""
    rows, cols = cells.shape[1] // side, cells.shape[2] // side
    return cells[:, : rows * side : side, : cols * side : side]


def covering(blocks: Tensor, side: int) -> Tensor:
    """[B, rows, cols, ...] of blocks -> [B, rows * side, cols * side, ...]: each value in every cell of its block."""
    if side == 1:
        return blocks
    return blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)
