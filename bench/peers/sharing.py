"""Recorded decisions as the boolean masks that eager code works with; shared tokens, and their predictions back in the cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import Policy, Trace, ViT

from ..layouts import NUM_PREFIX, gone_at
from ..options import PATCH_SIZE

THRESHOLD = 0.5  # of dCTS's scores; the answer is dropped


@dataclass(frozen=True)
class Masks:
    """Decisions on images that go on together, tokens in the peers' order: class token, then side by side, in raster order.

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
    """Decisions on one input: the images that go on together, in the batch's order, and the blocks of the whole batch."""

    groups: tuple[Masks, ...]
    blocks: dict[int, Tensor]


def decisions_of(trace: Trace, sides: tuple[int, ...], together: Sequence[slice]) -> Decisions | None:
    """None where the images that go on together have other sides, or not equally many tokens of each."""
    groups = [masks for images in together if (masks := masks_of(trace, sides, images)) is not None]
    if len(groups) < len(together):
        return None
    return Decisions(tuple(groups), {side: torch.cat([one.blocks[side] for one in groups]) for side in sides})


def masks_of(trace: Trace, sides: tuple[int, ...], images: slice) -> Masks | None:
    """The decisions on these images; None where they have other sides, or not equally many tokens of each."""
    covered = trace.layout.sides()[images]
    blocks = {side: corners(covered, side) == side for side in sides}
    per_image = torch.stack([mask.flatten(1).sum(1) for mask in blocks.values()], 1)
    counts = tuple(per_image[0].tolist())
    cells = sum(count * side * side for count, side in zip(counts, sides, strict=True))
    if not torch.equal(per_image, per_image[:1].expand_as(per_image)) or cells != covered[0].numel():
        return None
    halted = {}
    for stage in trace.stages:
        gone = gone_at(trace, stage)[images]
        parts = [gone.new_zeros(gone.shape[0], NUM_PREFIX)]
        for (side, mask), count in zip(blocks.items(), counts, strict=True):
            parts.append(corners(gone, side)[mask].view(gone.shape[0], count))
        halted[stage.block] = torch.cat(parts, 1)
    return Masks(blocks, counts, halted)


def corners(cells: Tensor, side: int) -> Tensor:
    """[B, rows, cols] -> [B, rows // side, cols // side]: what stands in the top left cell of each whole block."""
    rows, cols = cells.shape[1] // side, cells.shape[2] // side
    return cells[:, : rows * side : side, : cols * side : side]


def covering(blocks: Tensor, side: int) -> Tensor:
    """[B, rows, cols, ...] of blocks -> [B, rows * side, cols * side, ...]: each value in every cell of its block."""
    return blocks if side == 1 else blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)


def ask_for_quota(policy: Policy, images: Tensor, count: int) -> Tensor:
    """CTS's decision: bool [B, rows // 2, cols // 2], the `count` best 2x2 blocks of each image."""
    scores = policy.scores(images, patch_size=PATCH_SIZE)[0]
    shared = torch.zeros_like(scores, dtype=torch.bool)
    return shared.flatten(1).scatter(1, scores.flatten(1).topk(count).indices, True).view_as(scores)


def ask_for_sides(policy: Policy, images: Tensor) -> Tensor:
    """dCTS's decision: int [B, rows, cols], the side of the block over each cell; coarse blocks paint over finer ones."""
    rows, cols = images.shape[2] // PATCH_SIZE, images.shape[3] // PATCH_SIZE
    painted = torch.ones(images.shape[0], rows, cols, dtype=torch.int32, device=images.device)
    for side, scores in zip(policy.sides, policy.scores(images, patch_size=PATCH_SIZE), strict=False):
        taken = covering(scores > THRESHOLD, side)
        painted[:, : taken.shape[1], : taken.shape[2]].masked_fill_(taken, side)
    return painted


def superpatches(images: Tensor, side: int) -> Tensor:
    """Every block of a side shrunk to a patch: [B, rows // side, cols // side, C, patch, patch], a view of the shrunk images."""
    rows, cols = images.shape[2] // (PATCH_SIZE * side), images.shape[3] // (PATCH_SIZE * side)
    small = shrink(images, side)[:, :, : rows * PATCH_SIZE, : cols * PATCH_SIZE]
    return small.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)


def shrink(picture: Tensor, side: int) -> Tensor:
    """Bilinear for 2x2, as CTS; the mean for larger blocks, of which bilinear would see the four middle pixels alone."""
    if side == 1:
        return picture
    if side == 2:
        height, width = (extent // 2 * 2 for extent in picture.shape[2:])
        return F.interpolate(picture[:, :, :height, :width], scale_factor=0.5, mode="bilinear", align_corners=False)
    return F.avg_pool2d(picture, side)


def shared_tokens(vit: ViT, images: Tensor, decisions: Decisions) -> list[Tensor]:
    """The encoder's input, [images, 1 + tokens, D] for each group: class token, patches, then the shared blocks of each side.

    The blocks of a side are picked and embedded for the whole batch at once, however the images go on.
    """
    groups, grid = decisions.groups, (images.shape[2] // PATCH_SIZE, images.shape[3] // PATCH_SIZE)
    picture = vit.grid_positions(grid).t().unflatten(1, grid)[None]
    pixels, places = [], []
    for side, mask in decisions.blocks.items():
        pixels.append(superpatches(images, side)[mask].flatten(1))
        places.append(shrink(picture, side)[0].permute(1, 2, 0).expand(*mask.shape, -1)[mask])
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    tokens = F.linear(torch.cat(pixels), weight.flatten(1), bias) + torch.cat(places)
    sizes = [one.images * one.counts[number] for number in range(len(pixels)) for one in groups]
    parts, inputs = tokens.split(sizes), []
    for number, one in enumerate(groups):
        own = (part.view(one.images, -1, vit.embed_dim) for part in parts[number :: len(groups)] if part.shape[0])
        inputs.append(torch.cat([vit.prefix_tokens().expand(one.images, -1, -1), *own], 1))
    return inputs


def back_to_cells(predictions: Sequence[Tensor], decisions: Decisions, grid: tuple[int, int]) -> Tensor:
    """[images, tokens, classes] of each group, class token left out -> [B, classes, rows, cols], a block's in each of its cells."""
    blocks, groups = decisions.blocks, decisions.groups
    images, classes = sum(one.images for one in groups), predictions[0].shape[2]
    canvas = predictions[0].new_zeros(images, *grid, classes)
    by_side = zip(*(own.split(one.counts, 1) for own, one in zip(predictions, groups, strict=True)), strict=True)
    for (side, mask), parts in zip(blocks.items(), by_side, strict=True):
        values = canvas.new_zeros(*mask.shape, classes)
        values[mask] = torch.cat([part.flatten(0, 1) for part in parts])
        cells = covering(values, side)
        canvas[:, : cells.shape[1], : cells.shape[2]] += cells  # zero where no block of this side is
    return canvas.permute(0, 3, 1, 2)
