"""Recorded decisions as the boolean masks that eager code works with; shared tokens, and their predictions back in the cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import Trace, ViT

from ..engine import NotRun
from ..layouts import NUM_PREFIX, gone_at
from ..options import PATCH_SIZE


@dataclass(frozen=True)
class Group:
    """Images that go through the blocks together. Their tokens stand side by side: class token, then the blocks of each side, in raster order.

    Attributes:
        images: how many.
        counts: tokens of each side in every one of them.
        halted: bool [images, tokens]: who leaves at the exit; None without one.
    """

    images: int
    counts: tuple[int, ...]
    halted: Tensor | None


@dataclass(frozen=True)
class Decisions:
    """Decisions on one input: the groups in the batch's order, and side -> bool [B, rows // side, cols // side], which blocks are tokens."""

    groups: tuple[Group, ...]
    blocks: dict[int, Tensor]


def decisions_of(trace: Trace, sides: tuple[int, ...], groups: Sequence[slice]) -> Decisions:
    """Raises NotRun where images of a group have other sides, or not equally many tokens of each."""
    covered = trace.layout.sides()
    blocks = {side: corners(covered, side) == side for side in sides}
    gone = gone_at(trace, trace.stages[0]) if trace.stages else None
    found = []
    for images in groups:
        own = {side: mask[images] for side, mask in blocks.items()}
        counts = torch.stack([mask.flatten(1).sum(1) for mask in own.values()], 1)
        cells = sum(count * side * side for count, side in zip(counts[0].tolist(), sides, strict=True))
        if not torch.equal(counts, counts[:1].expand_as(counts)) or cells != covered[0].numel():
            raise NotRun("needs the same number of tokens in every image, and 2x2 blocks alone")
        halted = None
        if gone is not None:
            parts = [
                corners(gone[images], side)[mask].view(len(counts), -1) for side, mask in own.items() if mask.any()
            ]
            halted = torch.cat([gone.new_zeros(len(counts), NUM_PREFIX), *parts], 1)
        found.append(Group(len(counts), tuple(counts[0].tolist()), halted))
    return Decisions(tuple(found), blocks)


def corners(cells: Tensor, side: int) -> Tensor:
    """[B, rows, cols] -> [B, rows // side, cols // side]: what stands in the top left cell of each whole block."""
    rows, cols = cells.shape[1] // side, cells.shape[2] // side
    return cells[:, : rows * side : side, : cols * side : side]


def covering(blocks: Tensor, side: int) -> Tensor:
    """[B, rows, cols, ...] of blocks -> [B, rows * side, cols * side, ...]: each value in every cell of its block."""
    return blocks if side == 1 else blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)


def superpatches(images: Tensor, side: int) -> Tensor:
    """Every block of a side shrunk to a patch: [B, rows // side, cols // side, C, patch, patch], a view of the shrunk images."""
    rows, cols = images.shape[2] // (PATCH_SIZE * side), images.shape[3] // (PATCH_SIZE * side)
    small = shrink(images, side)[:, :, : rows * PATCH_SIZE, : cols * PATCH_SIZE]
    return small.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)


def shrink(picture: Tensor, side: int) -> Tensor:
    """Bilinear for 2x2, as CTS; the mean for larger blocks, of which bilinear would see the four middle pixels alone."""
    if side != 2:
        return picture if side == 1 else F.avg_pool2d(picture, side)
    height, width = (extent // 2 * 2 for extent in picture.shape[2:])
    return F.interpolate(picture[:, :, :height, :width], scale_factor=0.5, mode="bilinear", align_corners=False)


def shared_tokens(vit: ViT, images: Tensor, decisions: Decisions) -> list[Tensor]:
    """The encoder's input, [images, 1 + tokens, D] for each group; the blocks of a side are embedded for the whole batch at once."""
    grid = images.shape[2] // PATCH_SIZE, images.shape[3] // PATCH_SIZE
    picture = vit.grid_positions(grid).t().unflatten(1, grid)[None]
    pixels, places = [], []
    for side, mask in decisions.blocks.items():
        pixels.append(superpatches(images, side)[mask].flatten(1))
        places.append(shrink(picture, side)[0].permute(1, 2, 0).expand(*mask.shape, -1)[mask])
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    tokens = F.linear(torch.cat(pixels), weight.flatten(1), bias) + torch.cat(places)
    groups, inputs = decisions.groups, []
    parts = tokens.split([one.images * one.counts[number] for number in range(len(pixels)) for one in groups])
    for number, one in enumerate(groups):
        own = (part.view(one.images, -1, vit.embed_dim) for part in parts[number :: len(groups)] if part.shape[0])
        inputs.append(torch.cat([vit.prefix_tokens().expand(one.images, -1, -1), *own], 1))
    return inputs


def back_to_cells(predictions: Sequence[Tensor], decisions: Decisions, grid: tuple[int, int]) -> Tensor:
    """[images, tokens, classes] of each group, class token left out -> [B, classes, rows, cols], a block's in each of its cells."""
    images, classes = sum(one.images for one in decisions.groups), predictions[0].shape[2]
    canvas = predictions[0].new_zeros(images, *grid, classes)
    split = (own.split(one.counts, 1) for own, one in zip(predictions, decisions.groups, strict=True))
    for (side, mask), parts in zip(decisions.blocks.items(), zip(*split, strict=True), strict=True):
        values = canvas.new_zeros(*mask.shape, classes)
        values[mask] = torch.cat([part.flatten(0, 1) for part in parts])
        cells = covering(values, side)
        canvas[:, : cells.shape[1], : cells.shape[2]] += cells  # zero where no block of this side is
    return canvas.permute(0, 3, 1, 2)
