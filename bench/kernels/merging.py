"""The ops before the encoder: layouts, and merging images or tokens by them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels import SupertokenLayout, embed_patches, merge_patches, merge_tokens, resolve_layout

from ..engine import Case
from ..gate import Outputs
from ..layouts import NUM_PREFIX, SIDES, THRESHOLD
from ..options import Options
from .inputs import PATCH, Example, Source, spread
from .op import LARGE, Op, asked, everything
from .plain import cells_of_blocks, enumerate_sides, prefix_rows

CHANNELS = 3
FEATURES = CHANNELS * PATCH**2
TIMES = 4  # the images of the large cases: at a GPU's default sizes more than 120 MB, twice its cache
EMBEDDING = ("weight", "bias", "positions", "prefix")


def cases(options: Options) -> Iterator[Case]:
    sources = spread(options)
    for op in (RESOLVE_LAYOUT, FROM_SIDES, MERGE_PATCHES, EMBED_PATCHES, MERGE_TOKENS):
        yield from op.cases(options, sources)
    if asked(options, LARGE):
        sources = spread(options, TIMES)
        for op in (MERGE_PATCHES, MERGE_TOKENS):
            yield from op.beyond_any_cache().cases(options, sources)


def with_images(s: Source, width: int, **more: tuple[int, ...]) -> Example:
    """Images, the gradient of an output of that width, and parameters."""
    sizes = {"images": (s.batch, CHANNELS, *s.pixels), "gradient": (s.live, width), **more}
    return s.example({"gradient"}, sizes, {"weight": FEATURES**-0.5, "bias": 0.1, "positions": 0.1})


def with_embedding(s: Source) -> Example:
    weight, positions = (s.dim, CHANNELS, PATCH, PATCH), (s.cells, s.dim)
    return with_images(s, s.dim, weight=weight, bias=(s.dim,), positions=positions, prefix=(NUM_PREFIX, s.dim))


def with_tokens(s: Source) -> Example:
    sizes = {"tokens": (s.batch, s.cells, s.dim), "prefix": (NUM_PREFIX, s.dim), "gradient": (s.live, s.dim)}
    return s.example({"gradient"}, sizes)


def resolved(e: Example) -> Callable[[], SupertokenLayout]:
    sides = SIDES[: len(e.tensors)]
    return lambda: resolve_layout(
        list(e.tensors.values()), sides=sides, thresholds=THRESHOLD, grid=e.layout.grid, num_prefix=NUM_PREFIX
    )


def embedded(e: Example) -> Callable[[], Tensor]:
    weight, bias, positions, prefix = e.of(*EMBEDDING)
    return lambda: embed_patches(
        e["images"], e.layout, weight, bias, pos_embed=positions, prefix=prefix, tail="undefined"
    )


def layout_parts(result: Any, example: Example) -> Outputs:
    return result.cu_seqlens, result.cells[: result.num_tokens]


def plain_resolve(scores: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Fine to coarse, so that a coarse block paints over finer ones -> cu_seqlens, cells."""
    painted = torch.ones(scores[0].shape[0], *grid, dtype=torch.int32, device=scores[0].device)
    for score, side in zip(scores, SIDES, strict=False):
        rows, cols = score.shape[1:]
        blocks = painted[:, : rows * side, : cols * side].unflatten(2, (cols, side)).unflatten(1, (rows, side))
        blocks.masked_fill_((score > THRESHOLD)[:, :, None, :, None], side)
    return plain_from_sides(painted)


def plain_from_sides(sides: Tensor) -> tuple[Tensor, Tensor]:
    """A block stands where row and column are multiples of its side, a power of two -> cu_seqlens, cells."""
    batch, rows, cols = sides.shape
    row = torch.arange(rows, dtype=torch.int32, device=sides.device)[:, None]
    col = torch.arange(cols, dtype=torch.int32, device=sides.device)
    stands = (sides > 0) & (((row | col) & (sides - 1)) == 0)
    lengths = stands.sum((1, 2), dtype=torch.int32) + NUM_PREFIX
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    image, r, c = stands.nonzero(as_tuple=True)
    blocks = torch.stack([image, r, c, sides[image, r, c]], 1).to(torch.int32)
    cells = blocks.new_zeros(blocks.shape[0] + batch * NUM_PREFIX, 4)
    cells[torch.arange(blocks.shape[0], device=sides.device) + (image + 1) * NUM_PREFIX] = blocks
    cells[prefix_rows(cu_seqlens), 0] = torch.arange(batch, dtype=torch.int32, device=sides.device)[:, None]
    return cu_seqlens, cells


def merge_by_side(images: Tensor, cells: Tensor, patch: int) -> Tensor:
    """Mean over the pixels of the chosen blocks only, one side after the other; prefix rows zero."""
    out = images.new_zeros(cells.shape[0], images.shape[1] * patch**2)
    for side, rows in enumerate_sides(cells):
        image, r, c = cells[rows, :3].long().unbind(1)
        height, width = (extent // (patch * side) for extent in images.shape[2:])
        whole = images[:, :, : height * patch * side, : width * patch * side]
        split = whole.unflatten(3, (width, patch, side)).unflatten(2, (height, patch, side))
        blocks = split.permute(0, 2, 5, 1, 3, 4, 6, 7)[image, r // side, c // side]  # [n, C, p, side, p, side]
        out[rows] = blocks.mean((3, 5)).flatten(1)
    return out


def merge_by_pooling(images: Tensor, cells: Tensor, patch: int) -> Tensor:
    """avg_pool2d of whole images at each side, then the chosen patches; prefix rows zero."""
    out = images.new_zeros(cells.shape[0], images.shape[1] * patch**2)
    for side, rows in enumerate_sides(cells):
        image, r, c = cells[rows, :3].long().unbind(1)
        pooled = images if side == 1 else F.avg_pool2d(images, side)
        height, width = (extent // patch for extent in pooled.shape[2:])
        whole = pooled[:, :, : height * patch, : width * patch]
        split = whole.unflatten(3, (width, patch)).unflatten(2, (height, patch)).permute(0, 2, 4, 1, 3, 5)
        out[rows] = split[image, r // side, c // side].flatten(1)
    return out


def embed(
    merge: Callable[[Tensor, Tensor, int], Tensor],
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    prefix: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Merge, one linear layer, and the position embeddings pooled at every side, which all images share."""
    tokens = F.linear(merge(images, cells, weight.shape[2]), weight.flatten(1), bias)
    places = cells * cells.new_tensor([0, 1, 1, 1])
    tokens = tokens + tokens_by_pooling(positions[None], prefix, cu_seqlens, places, grid)
    tokens[prefix_rows(cu_seqlens)] = prefix
    return tokens


def tokens_by_side(tokens: Tensor, prefix: Tensor, cu_seqlens: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """All cells of the tokens of one side in one index_select, their means, and one write of all rows at the end."""
    flat, rows, means = tokens.flatten(0, 1), [prefix_rows(cu_seqlens).flatten()], [prefix.repeat(tokens.shape[0], 1)]
    for side, own in enumerate_sides(cells):
        covered = cells_of_blocks(cells[own], side, grid)
        rows.append(own)
        means.append(flat.index_select(0, covered.flatten()).view(*covered.shape, -1).mean(1))
    return tokens.new_empty(cells.shape[0], tokens.shape[2]).index_copy(0, torch.cat(rows), torch.cat(means))


def tokens_by_pooling(
    tokens: Tensor, prefix: Tensor, cu_seqlens: Tensor, cells: Tensor, grid: tuple[int, int]
) -> Tensor:
    """avg_pool2d of all tokens at each side, then the chosen rows."""
    channels_last = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    out = tokens.new_empty(cells.shape[0], tokens.shape[2])
    for side, rows in enumerate_sides(cells):
        image, r, c = cells[rows, :3].long().unbind(1)
        pooled = (channels_last if side == 1 else F.avg_pool2d(channels_last, side)).permute(0, 2, 3, 1)
        row = (image * pooled.shape[1] + r // side) * pooled.shape[2] + c // side
        out[rows] = pooled.reshape(-1, pooled.shape[3]).index_select(0, row)
    out[prefix_rows(cu_seqlens)] = prefix
    return out


RESOLVE_LAYOUT = Op(
    "resolve_layout",
    lambda source: Example(source.layout, source.scores),
    resolved,
    {"PyTorch": plain_resolve},
    lambda e: (list(e.tensors.values()), e.layout.grid),
    view=layout_parts,
)
FROM_SIDES = Op(
    "from_sides",
    lambda source: Example(source.layout, {"sides": source.layout.sides()}),
    lambda e: lambda: SupertokenLayout.from_sides(e["sides"], num_prefix=NUM_PREFIX),
    {"PyTorch": plain_from_sides},
    lambda e: e.of("sides"),
    registered="layout_from_sides",
    view=layout_parts,
)
MERGE_PATCHES = Op(
    "merge_patches",
    lambda source: with_images(source, FEATURES),
    lambda e: lambda: merge_patches(e["images"], e.layout, PATCH, tail="undefined"),
    {"PyTorch": merge_by_side, "PyTorch, by pooling": merge_by_pooling},
    lambda e: (e["images"], e.layout.cells, PATCH),
    gradients=("images",),
    bytes=everything,
)
EMBED_PATCHES = Op(
    "embed_patches",
    with_embedding,
    embedded,
    {
        "PyTorch": functools.partial(embed, merge_by_side),
        "PyTorch, by pooling": functools.partial(embed, merge_by_pooling),
    },
    lambda e: (*e.of("images", *EMBEDDING), e.layout.cu_seqlens, e.layout.cells, e.layout.grid),
    gradients=EMBEDDING,
)
MERGE_TOKENS = Op(
    "merge_tokens",
    with_tokens,
    lambda e: lambda: merge_tokens(e["tokens"], e.layout, prefix=e["prefix"], tail="undefined"),
    {"PyTorch": tokens_by_side, "PyTorch, by pooling": tokens_by_pooling},
    lambda e: (*e.of("tokens", "prefix"), e.layout.cu_seqlens, e.layout.cells, e.layout.grid),
    gradients=("tokens", "prefix"),
    bytes=everything,
)
