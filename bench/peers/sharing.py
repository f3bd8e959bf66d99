"""Token sharing in eager PyTorch: which blocks, their tokens, and their predictions back in the cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import Policy, ViT

from .decisions import Decisions, covering

THRESHOLD = 0.5  # of dCTS's scores; the answer is dropped


def ask_for_quota(policy: Policy, images: Tensor, patch_size: int, count: int) -> Tensor:
    """CTS's decision: bool [B, rows // 2, cols // 2], the `count` best 2x2 blocks of each image."""
    scores = policy.scores(images, patch_size=patch_size)[0]
    shared = torch.zeros_like(scores, dtype=torch.bool)
    return shared.flatten(1).scatter(1, scores.flatten(1).topk(count).indices, True).view_as(scores)


def ask_for_sides(policy: Policy, images: Tensor, patch_size: int) -> Tensor:
    """dCTS's decision: int [B, rows, cols], the side of the block over each cell; coarse blocks paint over finer ones."""
    rows, cols = images.shape[2] // patch_size, images.shape[3] // patch_size
    painted = torch.ones(images.shape[0], rows, cols, dtype=torch.int32, device=images.device)
    for side, scores in zip(policy.sides, policy.scores(images, patch_size=patch_size), strict=False):
        taken = covering(scores > THRESHOLD, side)
        painted[:, : taken.shape[1], : taken.shape[2]].masked_fill_(taken, side)
    return painted


def superpatches(images: Tensor, side: int, patch_size: int) -> Tensor:
    """Every block of a side shrunk to a patch: [B, rows // side, cols // side, C, patch_size, patch_size], a view of the shrunk images."""
    rows, cols = images.shape[2] // (patch_size * side), images.shape[3] // (patch_size * side)
    small = shrink(images, side)[:, :, : rows * patch_size, : cols * patch_size]
    return small.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)


def positions(vit: ViT, grid: tuple[int, int], side: int) -> Tensor:
    """Position embeddings of the blocks of a side, the grid's own shrunk as the pixels are: [rows // side, cols // side, D]."""
    picture = vit.grid_positions(grid).t().unflatten(1, grid)[None]
    return shrink(picture, side)[0].permute(1, 2, 0)


def shrink(picture: Tensor, side: int) -> Tensor:
    """Bilinear for 2x2, as CTS; the mean for larger blocks, of which bilinear would see the four middle pixels alone."""
    if side == 1:
        return picture
    if side == 2:
        height, width = (extent // 2 * 2 for extent in picture.shape[2:])
        return F.interpolate(picture[:, :, :height, :width], scale_factor=0.5, mode="bilinear", align_corners=False)
    return F.avg_pool2d(picture, side)


def shared_tokens(
    vit: ViT, patches: dict[int, Tensor], places: dict[int, Tensor], decisions: Decisions
) -> list[Tensor]:
    """The encoder's input, [images, 1 + tokens, D] for each group: class token, unshared patches, then the shared blocks of each side.

    The blocks of a side are picked and embedded for the whole batch at once, however the images go on.

    Args:
        vit: the model.
        patches: side -> `superpatches` of the batch.
        places: side -> `positions`.
        decisions: which blocks are tokens.
    """
    blocks, groups = decisions.blocks, decisions.groups
    embedding = vit.patch_embed.proj
    pixels = torch.cat([patches[side][mask].flatten(1) for side, mask in blocks.items()])
    where = torch.cat([places[side].expand(*mask.shape, -1)[mask] for side, mask in blocks.items()])
    tokens = F.linear(pixels, embedding.weight.flatten(1), embedding.bias) + where
    sizes = [one.images * one.counts[number] for number in range(len(blocks)) for one in groups]
    parts = tokens.split(sizes)
    inputs = []
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
