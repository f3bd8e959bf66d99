"""Recorded decisions as eager code works with them: which blocks are tokens, shared tokens, their predictions back in the cells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import Trace, ViT

from ..engine import NotRun
from ..layouts import gone_at
from ..options import PATCH_SIZE


@dataclass(frozen=True)
class Decisions:
    """Decisions on one input. Tokens stand image by image, in each by side and in raster order; class tokens are not among them.

    Attributes:
        blocks: side -> bool [B, rows // side, cols // side], which blocks are tokens.
        order: int64 [tokens], from side by side to image by image.
        lengths: tokens of what goes through the model together: of each image, or of the whole batch.
        cells: int64 [B, rows, cols], the number of the token that covers a cell.
        halted: bool [tokens], who leaves at the exit, if there is one.
    """

    blocks: dict[int, Tensor]
    order: Tensor
    lengths: tuple[int, ...]
    cells: Tensor
    halted: Tensor

    def sequences(self, values: Tensor) -> list[Tensor]:
        """[tokens, ...] -> [images, tokens of each, ...] of what goes through the model together."""
        images = self.cells.shape[0] // len(self.lengths)
        return [part.unflatten(0, (images, -1)) for part in values.split(self.lengths)]


def decisions_of(trace: Trace, sides: tuple[int, ...], *, per_image: bool) -> Decisions:
    """Raises NotRun where blocks have other sides or, unless images go through the model alone, their numbers of tokens differ."""
    covered = trace.layout.sides().long()
    blocks = {side: whole_blocks(covered, side)[:, ::side, ::side] == side for side in sides}
    found = [(mask.nonzero() * torch.tensor([1, side, side], device=mask.device)) for side, mask in blocks.items()]
    order = torch.cat(found)[:, 0].argsort(stable=True)
    corners = torch.cat(found)[order].unbind(1)
    lengths = corners[0].bincount().tolist()
    if not set(covered.unique().tolist()) <= set(sides) or not (per_image or len(set(lengths)) == 1):
        raise NotRun("needs the same number of tokens in every image, and 2x2 blocks alone")
    numbers = torch.zeros_like(covered).index_put(corners, torch.arange(len(order), device=order.device))
    image, row, col = torch.ones_like(covered).nonzero().t().unflatten(1, covered.shape)
    cells = numbers[image, row // covered * covered, col // covered * covered]
    gone = gone_at(trace, trace.stages[0]) if trace.stages else torch.zeros_like(covered, dtype=torch.bool)
    return Decisions(blocks, order, tuple(lengths if per_image else [len(order)]), cells, gone[corners])


def whole_blocks(cells: Tensor, side: int) -> Tensor:
    """[B, rows, cols] without what is left at the edges."""
    return cells[:, : cells.shape[1] // side * side, : cells.shape[2] // side * side]


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


def shared_tokens(vit: ViT, images: Tensor, decisions: Decisions) -> Tensor:
    """Embedded blocks [tokens, D] of the whole batch, with their positions."""
    grid = decisions.cells.shape[1:]
    picture = vit.grid_positions((grid[0], grid[1])).t().unflatten(1, grid)[None]
    pixels, places = [], []
    for side, mask in decisions.blocks.items():
        pixels.append(superpatches(images, side)[mask].flatten(1))
        places.append(shrink(picture, side)[0].permute(1, 2, 0).expand(*mask.shape, -1)[mask])
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    tokens = F.linear(torch.cat(pixels), weight.flatten(1), bias) + torch.cat(places)
    return tokens[decisions.order]


def back_to_cells(predictions: list[Tensor], decisions: Decisions) -> Tensor:
    """[images, tokens, classes] of what goes together -> [B, classes, rows, cols], a block's in each of its cells."""
    return torch.cat([own.flatten(0, 1) for own in predictions])[decisions.cells].permute(0, 3, 1, 2)
