"""Launchers of merging tokens and of embedding patches, and of their gradients. Kernels: those of ``common/cells.py`` and
``common/prefix_rows.py`` for tokens, ``patches.py`` and ``backward.py`` for pixels, ``linear`` for the embedding.

``embed_patches`` is three kernels: merge -> patches [capacity, C * p * p], a linear layer (on the live rows in static mode; the vendor's
matmul in exact mode, where the layout is ``trimmed``), and a ``reduce_blocks`` that adds the pooled positions and writes prefix rows. The matmul
follows the merge instead of being fused into it because of bytes: fused, each of the D / 128 column tiles reads the pixels again (before
caches); following, the pixels are read once and N patches written and read once. For ViT-L (D = 1024) at 1024 px and 2.5x fewer tokens
(N = 1638), an image in bf16: D / 128 * C * H * W * 2 = 50 MB against (C * H * W + 2 * N * C * p * p) * 2 = 11 MB. Timing: not measured yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.cells import expand_blocks_, reduce_blocks
from ..common.prefix_rows import sum_prefix_rows
from ..linear.launch import ragged_linear
from .backward import merge_patches_backward
from .patches import merge_patches_to


def merge_tokens(
    tokens: Tensor, cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int, prefix: Tensor | None, fill_tail: bool
) -> Tensor:
    features = tokens.unflatten(1, (rows, cols))
    return reduce_blocks(features, cu_seqlens, cells, mean=True, prefix=prefix, fill_tail=fill_tail)


def merge_tokens_backward(
    grad: Tensor, cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    grad_tokens = grad.new_empty(cu_seqlens.shape[0] - 1, rows, cols, grad.shape[1])
    expand_blocks_(grad_tokens, grad, cu_seqlens, cells, mean=True, fill_zero=True)
    return grad_tokens.flatten(1, 2), sum_prefix_rows(grad, cu_seqlens, num_prefix)


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
    # The tails of patches and embedded stay undefined: a matmul does not mix rows, and reduce_blocks reads none past the live count.
    patches = merge_patches_to(weight.dtype, images, cu_seqlens, cells, patch_size, bilinear, mean, std, False)
    lengths = None if trimmed else cu_seqlens
    embedded = ragged_linear(patches, weight.flatten(1), bias, lengths, None, None, None, False, expected_tokens)
    positions = None
    if pos_embed is not None:
        positions = pos_embed.unflatten(0, _grid(images, patch_size)).expand(images.shape[0], -1, -1, -1)
    return reduce_blocks(
        positions, cu_seqlens, cells, mean=True, bilinear=bilinear, prefix=prefix, addend=embedded, fill_tail=fill_tail
    )


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
    patch_size, dim = weight.shape[2], weight.shape[0]
    grads = [grad.new_empty(0) for _ in needed]  # one each: an op's outputs must not alias
    if needed[0]:
        # Not masked: a matmul does not mix rows, and only rows of blocks are read.
        grads[0] = merge_patches_backward(
            grad @ weight.flatten(1), cu_seqlens, cells, list(images.shape), patch_size, bilinear, std
        )
    if needed[1] or needed[2]:
        row = torch.arange(cells.shape[0], device=cells.device)
        holds_block = (row < cu_seqlens[-1]) & (cells[:, 3] > 0)
        block_grad = grad.masked_fill(~holds_block[:, None], 0)  # the tail may hold NaN
    if needed[1]:
        patches = merge_patches_to(weight.dtype, images, cu_seqlens, cells, patch_size, bilinear, mean, std, True)
        grads[1] = (block_grad.T @ patches).view(weight.shape)
    if needed[2]:
        grads[2] = block_grad.sum(0)
    if needed[3]:
        per_image = grad.new_empty(images.shape[0], *_grid(images, patch_size), dim)
        expand_blocks_(per_image, grad, cu_seqlens, cells, mean=True, bilinear=bilinear, fill_zero=True)
        grads[3] = per_image.sum(0).flatten(0, 1)
    if needed[4]:
        grads[4] = sum_prefix_rows(grad, cu_seqlens, num_prefix)
    return tuple(grads)


def _grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    return images.shape[2] // patch_size, images.shape[3] // patch_size
