"""The ops before the encoder: layouts, and merging images or tokens by them."""

from __future__ import annotations

import dataclasses
from typing import Any

from step_kernels import SupertokenLayout, embed_patches, merge_patches, merge_tokens, resolve_layout

from . import plain
from .examples import NUM_PREFIX, Example, Source
from .layouts import THRESHOLD
from .operation import Operation, Outputs, beyond_any_cache, block_rows, first_rows, layout_bytes, nbytes

CHANNELS = 3


def _layout_parts(result: Any, example: Example) -> Outputs:
    return result.cu_seqlens, result.cells[: int(result.cu_seqlens[-1])]


def _scores(source: Source) -> Example:
    scores = tuple(score.clone() for score in source.drawn.scores)  # the drawn ones are of other ops, too
    named = {f"scores of side {side}": score for side, score in zip(source.drawn.sides, scores, strict=True)}
    return Example(source.layout, named, scores=scores, sides=source.drawn.sides)


RESOLVE_LAYOUT = Operation(
    name="resolve_layout",
    shown=("scores of side 2",),
    registered=("resolve_layout",),
    make=_scores,
    ours=lambda e: resolve_layout(
        e.scores, sides=e.sides, thresholds=THRESHOLD, grid=e.layout.grid, num_prefix=NUM_PREFIX
    ),
    live=_layout_parts,
    plain=(plain.resolve_layout,),
    arguments=lambda e: (e.scores, e.sides, THRESHOLD, e.layout.grid, NUM_PREFIX),
    necessary_bytes=lambda e: nbytes(*e.scores) + layout_bytes(e.layout),
    makes_layout=True,
)

FROM_SIDES = Operation(
    name="from_sides",
    shown=("sides",),
    registered=("layout_from_sides",),
    make=lambda source: Example(source.layout, {"sides": source.layout.sides()}),
    ours=lambda e: SupertokenLayout.from_sides(e["sides"], num_prefix=NUM_PREFIX),
    live=_layout_parts,
    plain=(plain.from_sides,),
    arguments=lambda e: (e["sides"], NUM_PREFIX),
    necessary_bytes=lambda e: nbytes(e["sides"]) + layout_bytes(e.layout),
    makes_layout=True,
)


def _with_images(source: Source, width: int) -> Example:
    """Images, and the gradient of an output of that width."""
    shape = source.shape
    tensors = {
        "images": source.random(shape.batch, CHANNELS, *shape.size),
        "gradient": source.random(source.live, width),
    }
    return Example(source.layout, tensors, packed=frozenset({"gradient"}))


def _merge_patches_bytes(example: Example) -> int:
    # The output has the gradient's size: as many rows and columns, the same dtype.
    return nbytes(example["images"]) + layout_bytes(example.layout) + nbytes(example["gradient"])


def _merge_patches_backward_bytes(example: Example) -> int:
    gradient = nbytes(example["gradient"][: block_rows(example.layout)])
    return gradient + layout_bytes(example.layout) + nbytes(example["images"])


MERGE_PATCHES = Operation(
    name="merge_patches",
    shown=("images",),
    registered=("merge_patches",),
    make=lambda source: _with_images(source, CHANNELS * source.shape.patch**2),
    ours=lambda e: merge_patches(e["images"], e.layout, _patch_size(e), tail="undefined"),
    live=first_rows,
    plain=(plain.merge_patches, plain.merge_patches_by_pooling),
    arguments=lambda e: (e["images"], e.layout.cells, _patch_size(e)),
    necessary_bytes=_merge_patches_bytes,
    gradients=("images",),
    registered_backward=("merge_patches_backward",),
    backward_bytes=_merge_patches_backward_bytes,
)


def _patch_size(example: Example) -> int:
    return example["images"].shape[2] // example.layout.grid[0]


EMBEDDING = ("weight", "bias", "positions", "prefix")


def _embedding(source: Source) -> Example:
    shape = source.shape
    features = CHANNELS * shape.patch**2
    parameters = {
        "weight": source.random(shape.dim, CHANNELS, shape.patch, shape.patch, scale=features**-0.5),
        "bias": source.random(shape.dim, scale=0.1),
        "positions": source.random(shape.grid[0] * shape.grid[1], shape.dim, scale=0.1),
        "prefix": source.random(NUM_PREFIX, shape.dim),
    }
    example = _with_images(source, shape.dim)
    return dataclasses.replace(example, tensors={**example.tensors, **parameters})


def _embedding_bytes(example: Example) -> int:
    parameters = nbytes(*(example[name] for name in EMBEDDING))
    return parameters + nbytes(example["images"], example["gradient"]) + layout_bytes(example.layout)


def _embedding_backward_bytes(example: Example) -> int:
    """Reads the gradient, the images (for the weight's) and the layout; writes the parameters' gradients."""
    return _embedding_bytes(example)


EMBED_PATCHES = Operation(
    name="embed_patches",
    shown=("images", "weight"),
    registered=("embed_patches",),
    make=_embedding,
    ours=lambda e: embed_patches(
        e["images"], e.layout, e["weight"], e["bias"], pos_embed=e["positions"], prefix=e["prefix"], tail="undefined"
    ),
    live=first_rows,
    plain=(plain.embed_patches, plain.embed_patches_by_pooling),
    arguments=lambda e: (
        e["images"],
        *(e[name] for name in EMBEDDING),
        e.layout.cu_seqlens,
        e.layout.cells,
        e.layout.grid,
    ),
    necessary_bytes=_embedding_bytes,
    gradients=EMBEDDING,
    registered_backward=("embed_patches_backward",),
    backward_bytes=_embedding_backward_bytes,
)


def _tokens(source: Source) -> Example:
    shape = source.shape
    tensors = {
        "tokens": source.random(shape.batch, shape.grid[0] * shape.grid[1], shape.dim),
        "prefix": source.random(NUM_PREFIX, shape.dim),
        "gradient": source.random(source.live, shape.dim),
    }
    return Example(source.layout, tensors, packed=frozenset({"gradient"}))


def _merge_tokens_bytes(example: Example) -> int:
    return nbytes(example["tokens"], example["prefix"], example["gradient"]) + layout_bytes(example.layout)


MERGE_TOKENS = Operation(
    name="merge_tokens",
    shown=("tokens",),
    registered=("merge_tokens",),
    make=_tokens,
    ours=lambda e: merge_tokens(e["tokens"], e.layout, prefix=e["prefix"], tail="undefined"),
    live=first_rows,
    plain=(plain.merge_tokens, plain.merge_tokens_in_one_copy, plain.merge_tokens_by_pooling),
    arguments=lambda e: (e["tokens"], e["prefix"], e.layout.cu_seqlens, e.layout.cells, e.layout.grid),
    necessary_bytes=_merge_tokens_bytes,
    gradients=("tokens", "prefix"),
    registered_backward=("merge_tokens_backward",),
    # The same tensors' gradients, the other way.
    backward_bytes=_merge_tokens_bytes,
)

OPERATIONS = (
    RESOLVE_LAYOUT,
    FROM_SIDES,
    MERGE_PATCHES,
    beyond_any_cache(MERGE_PATCHES, 4),
    EMBED_PATCHES,
    MERGE_TOKENS,
    beyond_any_cache(MERGE_TOKENS, 4),
)
