"""Token sharing in eager PyTorch: which blocks, their tokens, and their predictions back in the cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import Policy, ViT

from .decisions import Masks, covering

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
        painted[:, : taken.shape[1], : taken.shape[2]][taken] = side
    return painted


def superpatches(images: Tensor, side: int, patch_size: int) -> Tensor:
    """Every block of a side shrunk to a patch: [B, rows // side, cols // side, C * patch_size**2]."""
    rows, cols = images.shape[2] // (patch_size * side), images.shape[3] // (patch_size * side)
    small = shrink(images, side)[:, :, : rows * patch_size, : cols * patch_size]
    return small.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3)


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


def shared_tokens(vit: ViT, patches: dict[int, Tensor], places: dict[int, Tensor], masks: Masks) -> Tensor:
    """[B, 1 + tokens, D] by boolean indexing: class token, unshared patches, then the shared blocks of each side.

    Args:
        vit: the model.
        patches: side -> `superpatches` of the images of `masks`.
        places: side -> `positions`.
        masks: equally many blocks in every image.
    """
    embedding, batch = vit.patch_embed.proj, next(iter(patches.values())).shape[0]
    pixels, where = [], []
    for side, mask, count in _by_side(masks):
        pixels.append(patches[side][mask].unflatten(0, (batch, count)))
        where.append(places[side].expand(batch, -1, -1, -1)[mask].unflatten(0, (batch, count)))
    tokens = F.linear(torch.cat(pixels, 1), embedding.weight.flatten(1), embedding.bias) + torch.cat(where, 1)
    return torch.cat([vit.prefix_tokens().expand(batch, -1, -1), tokens], 1)


def back_to_cells(predictions: Tensor, masks: Masks, grid: tuple[int, int]) -> Tensor:
    """[B, tokens, classes], class token left out -> [B, classes, rows, cols], a block's prediction in each of its cells."""
    images, _, classes = predictions.shape
    canvas = predictions.new_zeros(images, *grid, classes)
    for (side, mask, _), part in zip(_by_side(masks), predictions.split(masks.counts, 1), strict=True):
        blocks = predictions.new_zeros(*mask.shape, classes)
        blocks[mask] = part.flatten(0, 1)
        cells = covering(blocks, side)
        canvas[:, : cells.shape[1], : cells.shape[2]] += cells  # zero where no block of this side is
    return canvas.permute(0, 3, 1, 2)


def _by_side(masks: Masks) -> list[tuple[int, Tensor, int]]:
    return [(side, mask, count) for (side, mask), count in zip(masks.blocks.items(), masks.counts, strict=True)]
