"""The ops before the encoder: layouts, and merging images or tokens by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels import SupertokenLayout, embed_patches, merge_patches, merge_tokens, resolve_layout

from ..engine import Case
from ..layouts import NUM_PREFIX, SIDES, THRESHOLD
from ..options import Options
from .inputs import PATCH, Example, Source, spread
from .op import LARGE, Op, asked, everything

CHANNELS = 3
LEVELS = 5  # sides 1, 2, 4, 8, 16
FEATURES = CHANNELS * PATCH**2
TIMES = 4  # the images of the large cases: at a GPU's default sizes more than 120 MB, twice its cache
EMBEDDING = ("weight", "bias", "positions", "prefix")


def cases(options: Options) -> Iterator[Case]:
    sources = spread(options)
    for op in (RESOLVE_LAYOUT, MERGE_PATCHES, EMBED_PATCHES, MERGE_TOKENS):
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


def plain_resolve(scores: Sequence[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Fine to coarse, so that a coarse block paints over finer ones -> cu_seqlens, cells."""
    painted = torch.ones(scores[0].shape[0], *grid, dtype=torch.int32, device=scores[0].device)
    for score, side in zip(scores, SIDES, strict=False):
        rows, cols = score.shape[1:]
        blocks = painted[:, : rows * side, : cols * side].unflatten(2, (cols, side)).unflatten(1, (rows, side))
        blocks.masked_fill_((score > THRESHOLD)[:, :, None, :, None], side)
    # A block stands where row and column are multiples of its side, a power of two.
    row = torch.arange(grid[0], dtype=torch.int32, device=painted.device)[:, None]
    col = torch.arange(grid[1], dtype=torch.int32, device=painted.device)
    stands, batch = ((row | col) & (painted - 1)) == 0, painted.shape[0]
    lengths = stands.sum((1, 2), dtype=torch.int32) + NUM_PREFIX
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    image, r, c = stands.nonzero(as_tuple=True)
    blocks = torch.stack([image, r, c, painted[image, r, c]], 1).to(torch.int32)
    cells = blocks.new_zeros(blocks.shape[0] + batch * NUM_PREFIX, 4)
    cells[torch.arange(blocks.shape[0], device=painted.device) + (image + 1) * NUM_PREFIX] = blocks
    cells[prefix_rows(cu_seqlens), 0] = torch.arange(batch, dtype=torch.int32, device=painted.device)[:, None]
    return cu_seqlens, cells


def prefix_rows(cu_seqlens: Tensor) -> Tensor:
    """int [B, NUM_PREFIX]"""
    return cu_seqlens[:-1, None] + torch.arange(NUM_PREFIX, device=cu_seqlens.device)


def enumerate_sides(cells: Tensor) -> list[tuple[int, Tensor]]:
    """(side, rows of the tokens that have it) for each side that occurs: one sort and one host sync for all."""
    side = cells[:, 3]
    known = 1 << torch.arange(LEVELS, dtype=torch.int32, device=cells.device)
    counts = (side[:, None] == known).sum(0).tolist()
    order = side.argsort(stable=True)
    groups = order[cells.shape[0] - sum(counts) :].split(counts)  # prefix tokens, of side 0, come first
    return [(1 << level, rows) for level, rows in enumerate(groups) if rows.shape[0]]


def merge_by_pooling(images: Tensor, cells: Tensor, patch: int) -> Tensor:
    """avg_pool2d of whole pictures at each side, then the chosen patches; prefix rows zero."""
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
    tokens = F.linear(merge_by_pooling(images, cells, weight.shape[2]), weight.flatten(1), bias)
    places = cells * cells.new_tensor([0, 1, 1, 1])
    tokens = tokens + tokens_by_pooling(positions[None], prefix, cu_seqlens, places, grid)
    tokens[prefix_rows(cu_seqlens)] = prefix
    return tokens


def tokens_by_pooling(
    tokens: Tensor, prefix: Tensor, cu_seqlens: Tensor, cells: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The same of tokens, as pictures of patches of one pixel."""
    out = merge_by_pooling(tokens.unflatten(1, grid).permute(0, 3, 1, 2), cells, 1)
    out[prefix_rows(cu_seqlens)] = prefix
    return out


RESOLVE_LAYOUT = Op(
    "resolve_layout",
    lambda source: Example(source.layout, source.scores),
    resolved,
    {"PyTorch": plain_resolve},
    lambda e: (list(e.tensors.values()), e.layout.grid),
    view=lambda result, e: (result.cu_seqlens, result.cells[: result.num_tokens]),
)
MERGE_PATCHES = Op(
    "merge_patches",
    lambda source: with_images(source, FEATURES),
    lambda e: lambda: merge_patches(e["images"], e.layout, PATCH, tail="undefined"),
    {"PyTorch": merge_by_pooling},
    lambda e: (e["images"], e.layout.cells, PATCH),
    gradients=("images",),
    bytes=everything,
)
EMBED_PATCHES = Op(
    "embed_patches",
    with_embedding,
    embedded,
    {"PyTorch": embed},
    lambda e: (*e.of("images", *EMBEDDING), e.layout.cu_seqlens, e.layout.cells, e.layout.grid),
    gradients=EMBEDDING,
)
MERGE_TOKENS = Op(
    "merge_tokens",
    with_tokens,
    lambda e: lambda: merge_tokens(e["tokens"], e.layout, prefix=e["prefix"], tail="undefined"),
    {"PyTorch": tokens_by_pooling},
    lambda e: (*e.of("tokens", "prefix"), e.layout.cu_seqlens, e.layout.cells, e.layout.grid),
    gradients=("tokens", "prefix"),
    bytes=everything,
)
