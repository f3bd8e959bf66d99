"""Blocks of cells as views of a feature grid: what merging, position pooling, scattering and their gradients share.

All tokens of one side are handled at once. The grid, cropped to whole blocks, is viewed as [B, R, C, side, side, D]; indexing that view
with the tokens' (image, block row, block column) reads or writes each covered cell once and touches no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import SIDES
from ..numerics import accumulator


@dataclass(frozen=True)
class TokensOfSide:
    """The live tokens that cover blocks of one side."""

    side: int
    index: Tensor  # int64 [n]: rows of the token tensor
    block: tuple[Tensor, Tensor, Tensor]  # int64 [n] each: image, block row, block column


def live_count(cu_seqlens: Tensor | None, capacity: int) -> int:
    """Rows that hold tokens; None means all of them."""
    return capacity if cu_seqlens is None else int(cu_seqlens[-1])


def with_tail(live: Tensor, capacity: int) -> Tensor:
    """``live`` [n, ...] followed by zeros up to ``capacity`` rows."""
    if live.shape[0] == capacity:
        return live
    out = live.new_zeros(capacity, *live.shape[1:])
    out[: live.shape[0]] = live
    return out


def unless_missing(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """A backward op's gradients; an empty tensor, one each because an op's outputs must not alias, for one that is not needed."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def tokens_by_side(cu_seqlens: Tensor, cells: Tensor, where: Tensor | None = None) -> Iterator[TokensOfSide]:
    """The live, selected, non-prefix tokens, grouped by the side of their block; sides without tokens are left out."""
    cells = cells[: live_count(cu_seqlens, cells.shape[0])]
    image, row, col, side_of = cells.long().unbind(1)
    for side in SIDES:
        chosen = side_of == side
        if where is not None:
            chosen &= where[: cells.shape[0]]
        index = chosen.nonzero().flatten()
        if index.numel():
            block = image[index], row[index] // side, col[index] // side
            yield TokensOfSide(side, index, block)


def block_view(features: Tensor, side: int) -> Tensor:
    """[B, rows, cols, D] -> view [B, rows // side, cols // side, side, side, D]; cells past the last whole block are cropped."""
    rows, cols = features.shape[1] // side, features.shape[2] // side
    whole = features[:, : rows * side, : cols * side]
    return whole.unflatten(2, (cols, side)).unflatten(1, (rows, side)).transpose(2, 3)


def sampled(blocks: Tensor, dims: tuple[int, int], bilinear: bool) -> Tensor:
    """The cells of each block that its pooled value averages: all (area), or the central 2x2.

    ``F.interpolate(scale_factor=1/side, mode="bilinear", align_corners=False)`` samples halfway between the two central cells.
    """
    side = blocks.shape[dims[0]]
    if not bilinear or side == 1:
        return blocks
    for dim in dims:
        blocks = blocks.narrow(dim, side // 2 - 1, 2)
    return blocks


def reduce_blocks(
    features: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    *,
    mean: bool,
    bilinear: bool = False,
    where: Tensor | None = None,
) -> Tensor:
    """Per token, the mean or sum of ``features`` [B, rows, cols, D] over its block: [capacity, D]; zeros in every other row."""
    out = features.new_zeros(cells.shape[0], features.shape[3])
    for tokens in tokens_by_side(cu_seqlens, cells, where):
        blocks = sampled(block_view(features, tokens.side), (3, 4), bilinear)[tokens.block]
        if tokens.side == 1:
            out[tokens.index] = blocks[:, 0, 0]
        elif mean:
            out[tokens.index] = blocks.mean((1, 2), dtype=accumulator(features.dtype)).to(out.dtype)
        else:
            out[tokens.index] = blocks.sum((1, 2), dtype=accumulator(features.dtype)).to(out.dtype)
    return out


def expand_blocks_(
    features: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    *,
    mean: bool = False,
    bilinear: bool = False,
    where: Tensor | None = None,
) -> Tensor:
    """The adjoint of ``reduce_blocks``: write each token's values [capacity, D] into the cells of its block, in place."""
    for tokens in tokens_by_side(cu_seqlens, cells, where):
        blocks = sampled(block_view(features, tokens.side), (3, 4), bilinear)
        chosen = values[tokens.index].to(features.dtype)
        if mean:
            chosen = chosen / (blocks.shape[3] * blocks.shape[4])
        blocks[tokens.block] = chosen[:, None, None]
    return features


def prefix_rows(cu_seqlens: Tensor, num_prefix: int) -> Tensor:
    """Rows of the prefix tokens: int64 [B, num_prefix]."""
    return cu_seqlens[:-1, None].long() + torch.arange(num_prefix, device=cu_seqlens.device)
