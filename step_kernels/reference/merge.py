"""Reference of merging: pixels, tokens and position embeddings pooled over supertokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import accumulator
from .cells import (
    TokensOfSide,
    expand_blocks_,
    live_count,
    prefix_rows,
    reduce_blocks,
    sampled,
    tokens_by_side,
    unless_missing,
)


def merge_patches(
    images: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    patch_size: int,
    bilinear: bool,
    mean: Tensor | None,
    std: Tensor | None,
    fill_tail: bool,
) -> Tensor:
    return _merge_patches(images, cu_seqlens, cells, patch_size, bilinear, mean, std, _output_dtype(images))


def merge_patches_backward(
    grad: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    image_shape: list[int],
    patch_size: int,
    bilinear: bool,
    std: Tensor | None,
) -> Tensor:
    grad_images = grad.new_zeros(image_shape)
    for tokens in tokens_by_side(cu_seqlens, cells):
        blocks = sampled(_pixel_blocks(grad_images, patch_size, tokens.side), (5, 7), bilinear)
        patches = grad[tokens.index].unflatten(1, (image_shape[1], patch_size, patch_size))
        if std is not None:
            patches = patches / std.to(patches.dtype)[:, None, None]
        patches = patches / (blocks.shape[5] * blocks.shape[7])
        blocks[tokens.block] = patches[:, :, :, None, :, None]
    return grad_images


def embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    cu_seqlens: Tensor,
    cells: Tensor,
    bilinear: bool,
    trimmed: bool,
    fill_tail: bool,
    expected_tokens: int | None,
) -> Tensor:
    patch_size = weight.shape[2]
    patches = _merge_patches(images, cu_seqlens, cells, patch_size, bilinear, mean, std, weight.dtype)
    out = F.linear(patches, weight.flatten(1), bias)
    if pos_embed is not None:
        grid = images.shape[2] // patch_size, images.shape[3] // patch_size
        positions = pos_embed.unflatten(0, grid).expand(images.shape[0], -1, -1, -1)
        out += reduce_blocks(positions, cu_seqlens, cells, mean=True, bilinear=bilinear)
    is_block = _is_block(cu_seqlens, cells)
    out.masked_fill_(~is_block[:, None], 0)  # the bias reached prefix rows and the tail as well
    if prefix is not None:
        out[prefix_rows(cu_seqlens, prefix.shape[0])] = prefix
    return out


def embed_patches_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    cu_seqlens: Tensor,
    cells: Tensor,
    bilinear: bool,
    num_prefix: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of images, weight, bias, pos_embed and prefix; an empty tensor for one that is not needed."""
    patch_size = weight.shape[2]
    is_block = _is_block(cu_seqlens, cells)
    block_grad = torch.where(is_block[:, None], grad, 0)
    grad_images = grad_weight = grad_bias = grad_positions = grad_prefix = None
    if needed[0]:
        grad_patches = block_grad @ weight.flatten(1)
        grad_images = merge_patches_backward(
            grad_patches, cu_seqlens, cells, list(images.shape), patch_size, bilinear, std
        )
    if needed[1]:
        patches = _merge_patches(images, cu_seqlens, cells, patch_size, bilinear, mean, std, weight.dtype)
        grad_weight = (block_grad.T @ patches).view_as(weight)
    if needed[2]:
        grad_bias = block_grad.sum(0)
    if needed[3]:
        grid = images.shape[2] // patch_size, images.shape[3] // patch_size
        per_image = grad.new_zeros(images.shape[0], *grid, grad.shape[1])
        expand_blocks_(per_image, block_grad, cu_seqlens, cells, mean=True, bilinear=bilinear)
        grad_positions = per_image.sum(0).flatten(0, 1)
    if needed[4]:
        grad_prefix = grad[prefix_rows(cu_seqlens, num_prefix)].sum(0)
    return unless_missing(grad, grad_images, grad_weight, grad_bias, grad_positions, grad_prefix)


def merge_tokens(
    tokens: Tensor, cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int, prefix: Tensor | None, fill_tail: bool
) -> Tensor:
    out = reduce_blocks(tokens.unflatten(1, (rows, cols)), cu_seqlens, cells, mean=True)
    if prefix is not None:
        out[prefix_rows(cu_seqlens, prefix.shape[0])] = prefix
    return out


def merge_tokens_backward(
    grad: Tensor, cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    grad_tokens = grad.new_zeros(cu_seqlens.shape[0] - 1, rows, cols, grad.shape[1])
    expand_blocks_(grad_tokens, grad, cu_seqlens, cells, mean=True)
    return grad_tokens.flatten(1, 2), grad[prefix_rows(cu_seqlens, num_prefix)].sum(0)


def _merge_patches(
    images: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    patch_size: int,
    bilinear: bool,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    sums = accumulator(dtype)
    images = images.contiguous()  # once: blocks are gathered from it for each side
    out = images.new_zeros(cells.shape[0], images.shape[1] * patch_size**2, dtype=dtype)
    for tokens in tokens_by_side(cu_seqlens, cells):
        blocks = sampled(_gathered_blocks(images, patch_size, tokens), (3, 5), bilinear)
        # [n, C, p, sampled, p, sampled] -> [n, C, p, p]; rows, then columns: a CPU takes four times as long for both at once.
        patches = blocks[:, :, :, 0, :, 0] if tokens.side == 1 else blocks.to(sums).mean(3).mean(4)
        if images.dtype == torch.uint8:
            patches = patches.to(sums) / 255
        if mean is not None:
            patches = patches.to(sums) - mean.to(sums)[:, None, None]
        if std is not None:
            patches = patches.to(sums) / std.to(sums)[:, None, None]
        out[tokens.index] = patches.to(dtype).flatten(1)
    return out


def _pixel_blocks(images: Tensor, patch_size: int, side: int) -> Tensor:
    """[B, C, H, W] -> view [B, R, cols, C, p, side, p, side]: of block (r, c), pixel (y * side + i, x * side + j) at [..., y, i, x, j]."""
    size = patch_size * side
    rows, cols = images.shape[2] // size, images.shape[3] // size
    whole = images[:, :, : rows * size, : cols * size]
    split = whole.unflatten(3, (cols, patch_size, side)).unflatten(2, (rows, patch_size, side))
    return split.permute(0, 2, 5, 1, 3, 4, 6, 7)


def _gathered_blocks(images: Tensor, patch_size: int, tokens: TokensOfSide) -> Tensor:
    """[n, C, p, side, p, side], as ``_pixel_blocks(...)[tokens.block]``, but copied from contiguous images in runs of a patch's width: on a
    CPU in less time."""
    channels, height, width = images.shape[1:]
    image, row, col = tokens.block
    size, runs_across = patch_size * tokens.side, width // patch_size
    first = (image * channels * height + row * size) * runs_across + col * tokens.side
    channel, y, x = (torch.arange(n, device=images.device) for n in (channels, size, tokens.side))
    within = (channel[:, None, None] * height + y[:, None]) * runs_across + x
    runs = images.view(-1, patch_size).index_select(0, (first[:, None] + within.flatten()).flatten())
    return runs.view(-1, channels, patch_size, tokens.side, patch_size, tokens.side)


def _output_dtype(images: Tensor) -> torch.dtype:
    return torch.float32 if images.dtype == torch.uint8 else images.dtype


def _is_block(cu_seqlens: Tensor, cells: Tensor) -> Tensor:
    """bool [capacity]: live rows that hold a block, not a prefix token."""
    row = torch.arange(cells.shape[0], device=cells.device)
    return (row < live_count(cu_seqlens, 0)) & (cells[:, 3] > 0)
