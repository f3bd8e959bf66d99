"""The attentions: ragged at spread, wide, equal and adversarial lengths, masked, and by class queries.

FLOPs are those of the two matmuls on the true lengths, 2 for a multiply-add: 4 * sum(L_i^2) * H * D forward. A backward pass
has five such matmuls instead of two, so 2.5 times that; forward + backward 3.5 times. What padding or a dense batch computes
besides does not count, whoever does it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from step_kernels import SupertokenLayout, class_attention, masked_attention, ragged_attention, use_backend

from . import plain_attention
from .examples import Example, Source
from .operation import Operation, Rival, first_rows, nbytes, whole

HEAD_DIM = 64  # of every ViT preset
SHORT, LONG = 1 / 64, 1.0  # adversarial lengths, as shares of the patch grid
WIDE = 1 / 10, 1.0  # the shortest and the longest of evenly spread lengths
FEWEST_IMAGES = 4  # of an adversarial batch
QKV = ("q", "k", "v")


def qkv(example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of every attention."""
    return example["q"], example["k"], example["v"]


def heads_of(source: Source) -> tuple[int, int]:
    """Heads and head dimension: those of the ViT whose width it is; one head where that is narrower than a head."""
    heads = max(1, source.shape.dim // HEAD_DIM)
    return heads, source.shape.dim // heads


def layout_of(lengths: Tensor, grid: tuple[int, int]) -> SupertokenLayout:
    """Exact layout of images with that many tokens: the first cells of each patch grid."""
    rows, cols = grid
    taken = torch.arange(rows * cols, device=lengths.device) < lengths[:, None]
    return _layout_where(taken, grid)


def _layout_where(taken: Tensor, grid: tuple[int, int]) -> SupertokenLayout:
    with use_backend("reference"):
        return SupertokenLayout.from_sides(taken.unflatten(1, grid).to(torch.int32)).trim()


def spread(source: Source) -> SupertokenLayout:
    """The run's own layout: what merging leaves, CV 0.3."""
    return source.layout


def wide(source: Source) -> SupertokenLayout:
    """Evenly spread from a tenth of the patch grid to all of it."""
    cells = _cells(source)
    lengths = torch.linspace(*WIDE, max(2, source.shape.batch)).mul(cells).long().clamp(min=1)
    return layout_of(lengths.to(source.shape.device), source.shape.grid)


def equal(share: float) -> Callable[[Source], SupertokenLayout]:
    """Every image has that share of the patch grid."""

    def make(source: Source) -> SupertokenLayout:
        lengths = torch.full((source.shape.batch,), max(1, int(share * _cells(source))), device=source.shape.device)
        return layout_of(lengths, source.shape.grid)

    return make


def adversarial(source: Source) -> SupertokenLayout:
    """One long image among short ones, and an empty one at the end."""
    cells = _cells(source)
    lengths = torch.full((max(FEWEST_IMAGES, source.shape.batch),), max(1, int(SHORT * cells)))
    lengths[len(lengths) // 2], lengths[-1] = int(LONG * cells), 0
    return layout_of(lengths.to(source.shape.device), source.shape.grid)


def _cells(source: Source) -> int:
    rows, cols = source.shape.grid
    return rows * cols


def ragged_flops(example: Example) -> int:
    """4 * sum(L_i^2) * H * D: every token against every token of its image."""
    heads, head_dim = example["q"].shape[1], example["q"].shape[-1]
    return 4 * int(example.layout.lengths().long().square().sum()) * heads * head_dim


def _bytes(example: Example) -> int:
    """q, k, v and where images begin are read, the output (of q's and the gradient's size) is written."""
    return nbytes(*qkv(example), example["gradient"], example.layout.cu_seqlens)


def _backward_bytes(example: Example) -> int:
    """The output's gradient, q, k, v and cu_seqlens are read, three gradients are written."""
    return _bytes(example) + nbytes(*qkv(example))


def _ragged(name: str, lengths: Callable[[Source], SupertokenLayout], rivals: tuple[Rival, ...]) -> Operation:
    def make(source: Source) -> Example:
        layout = lengths(source)
        names = (*QKV, "gradient")
        tensors = {name: source.random(layout.capacity, *heads_of(source)) for name in names}
        return Example(layout, tensors, packed=frozenset(names))

    return Operation(
        name=name,
        shown=("q",),
        registered=("ragged_attention",),
        make=make,
        ours=lambda e: ragged_attention(
            *qkv(e), e.layout.cu_seqlens, e.layout.max_seqlen, schedule=e.schedule, tail="undefined"
        ),
        live=first_rows,
        rivals=rivals,
        necessary_bytes=_bytes,
        gradients=QKV,
        registered_backward=("ragged_attention_backward",),
        backward_bytes=_backward_bytes,
        flops=ragged_flops,
    )


RAGGED = (
    _ragged("ragged_attention", spread, plain_attention.RAGGED),
    _ragged("ragged_attention_wide", wide, plain_attention.RAGGED),
    _ragged("ragged_attention_equal", equal(1 / 4), plain_attention.RAGGED + plain_attention.DENSE),
    _ragged("ragged_attention_equal", equal(1), plain_attention.RAGGED + plain_attention.DENSE),
    _ragged("ragged_attention_adversarial", adversarial, plain_attention.RAGGED),
)


def _dense_batch(source: Source) -> Example:
    """A dense batch of which as many tokens of each image are kept as merging would leave blocks."""
    batch, cells = source.shape.batch, _cells(source)
    counts = source.layout.lengths() - source.layout.num_prefix
    order = torch.rand(batch, cells, generator=source.generator, device=source.shape.device).argsort(1).argsort(1)
    keep = order < counts[:, None]
    # [B, L, H, D] in memory, as a projection writes them.
    random = {name: source.random(batch, cells, *heads_of(source)).transpose(1, 2) for name in (*QKV, "gradient")}
    return Example(_layout_where(keep, source.shape.grid), {**random, "keep": keep})


def _masked_bytes(example: Example) -> int:
    """The kept rows of q, k and v and the mask are read, the whole output is written."""
    kept = example.layout.capacity / example["keep"].numel()
    return round(kept * nbytes(*qkv(example))) + nbytes(example["gradient"], example["keep"])


def _masked_backward_bytes(example: Example) -> int:
    """The kept rows of the output's gradient, q, k and v and the mask are read, three whole gradients are written."""
    kept = example.layout.capacity / example["keep"].numel()
    return round(kept * nbytes(*qkv(example), example["gradient"])) + nbytes(*qkv(example), example["keep"])


MASKED_ATTENTION = Operation(
    name="masked_attention",
    shown=("q",),
    registered=("kept_rows", "masked_attention"),
    make=_dense_batch,
    ours=lambda e: masked_attention(*qkv(e), e["keep"]),
    live=whole,
    rivals=plain_attention.MASKED,
    necessary_bytes=_masked_bytes,
    gradients=QKV,
    registered_backward=("masked_attention_backward",),
    backward_bytes=_masked_backward_bytes,
    flops=ragged_flops,
)


def _class_queries(source: Source) -> Example:
    queries = (source.shape.batch, source.shape.classes, *heads_of(source))
    tensors = {
        "q": source.random(*queries),
        **{name: source.random(source.live, *heads_of(source)) for name in ("k", "v")},
        "gradient": source.random(*queries),
    }
    return Example(source.layout, tensors, packed=frozenset({"k", "v"}))


def class_flops(example: Example) -> int:
    """4 * C * sum(L_i) * H * D: every class query against every token of its image."""
    _, classes, heads, head_dim = example["q"].shape
    return 4 * classes * example.layout.capacity * heads * head_dim


CLASS_ATTENTION = Operation(
    name="class_attention",
    shown=("q", "k"),
    registered=("class_attention",),
    make=_class_queries,
    ours=lambda e: class_attention(*qkv(e), e.layout.cu_seqlens, e.layout.max_seqlen, tail="undefined"),
    live=whole,
    rivals=plain_attention.CLASSES,
    necessary_bytes=_bytes,
    gradients=QKV,
    registered_backward=("class_attention_backward",),
    backward_bytes=_backward_bytes,
    flops=class_flops,
)

OPERATIONS = (*RAGGED, MASKED_ATTENTION, CLASS_ATTENTION)
