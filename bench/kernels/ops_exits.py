"""The ops of an early exit: the decision with or without its head, compaction, canvas, and the gather of survivors."""

from __future__ import annotations

import math
from typing import Any

import torch

from step_kernels import exit_head, gather_tokens, halt_tokens, use_backend

from . import plain, plain_exits
from .examples import Example, Source
from .operation import Operation, Outputs, covered_cells, layout_bytes, nbytes

THRESHOLD = 0.95
LOW_LEAD, HIGH_LEAD = 2.5, 12.0  # logits ahead of the other classes: far below the threshold, and far above it
BYTES_PER_ROW = 1 + 4 + 4  # halted, confidence and labels of each row of the input
BYTES_PER_SURVIVOR = 16 + 4  # its cells and its row in the input


def _stage_parts(result: Any, example: Example) -> Outputs:
    halting, survivors = result
    live, left = example.layout.num_tokens, int(halting.layout.cu_seqlens[-1])
    decided = halting.halted[:live], halting.confidence[:live], halting.labels[:live]
    packed = halting.layout.cells[:left], halting.rows[:left]
    return halting.layout.cu_seqlens, *packed, *decided, halting.canvas, survivors[:left]


def _stage_bytes(example: Example, read: int) -> int:
    """`read`: bytes of the scores, or of what they are computed from, without the survivors' rows to gather."""
    halted, tokens = example["halted"], example["tokens"]
    left = example.layout.capacity - int(halted.sum())
    row = tokens.shape[1] * tokens.element_size()
    cell = example["canvas"].shape[1] * example["canvas"].element_size()
    written = nbytes(example.layout.cu_seqlens) + example.layout.capacity * BYTES_PER_ROW + left * BYTES_PER_SURVIVOR
    return read + layout_bytes(example.layout) + written + covered_cells(example.layout, halted) * cell + left * row


def _halt_tokens_bytes(example: Example) -> int:
    tokens = example["tokens"]
    left = example.layout.capacity - int(example["halted"].sum())
    # Of the tokens, only the survivors' rows have to be read.
    return _stage_bytes(example, nbytes(example["scores"]) + left * tokens.shape[1] * tokens.element_size())


def _scored(source: Source) -> Example:
    halted = source.halted()
    logits = source.logits(halted, LOW_LEAD, HIGH_LEAD)
    scores = source.random(source.live, source.shape.classes, scale=0.2)
    tensors = {
        "scores": (scores + logits).to(source.shape.dtype),
        "tokens": source.random(source.live, source.shape.dim),
        "halted": halted,
        **source.canvas(source.shape.classes),
    }
    return Example(source.layout, tensors, packed=frozenset({"scores", "tokens", "halted"}))


def _halt_and_gather(example: Example) -> Any:
    halting = halt_tokens(example["scores"], example.layout, THRESHOLD, canvas=example["canvas"])
    return halting, gather_tokens(example["tokens"], halting, tail="undefined")


HALT_TOKENS = Operation(
    name="halt_tokens",
    shown=("scores", "tokens"),
    registered=("halt_tokens", "gather_tokens"),
    make=_scored,
    ours=_halt_and_gather,
    live=_stage_parts,
    plain=(plain_exits.halt_tokens,),
    arguments=lambda e: (
        e["scores"],
        e["tokens"],
        e["canvas"],
        e.layout.cu_seqlens,
        e.layout.cells,
        THRESHOLD,
    ),
    necessary_bytes=_halt_tokens_bytes,
)

HEAD = ("norm_weight", "norm_bias", "weight", "bias")


def _headed(source: Source) -> Example:
    """Tokens whose logits lead by the two leads above, through a head of orthogonal class directions.

    LayerNorm takes a token's length away, so a small lead is a token that mostly points away from all classes.
    """
    shape = source.shape
    random = source.random(shape.dim, shape.classes + 1).float()
    directions = torch.linalg.qr(random).Q.T
    classes, away = directions[:-1], directions[-1]
    halted = source.halted()
    logits = source.logits(halted, LOW_LEAD, HIGH_LEAD)
    share = 0.9 * logits / HIGH_LEAD
    tokens = share @ classes + (1 - share.square().sum(1, keepdim=True)).sqrt() * away
    scale = HIGH_LEAD / (0.9 * math.sqrt(shape.dim))
    tensors = {
        "tokens": (math.sqrt(shape.dim) * tokens + source.random(*tokens.shape, scale=0.05)).to(shape.dtype),
        "norm_weight": 1 + source.random(shape.dim, scale=0.02),
        "norm_bias": source.random(shape.dim, scale=0.02),
        "weight": (scale * classes).to(shape.dtype),
        "bias": source.random(shape.classes, scale=0.1),
        "halted": halted,
        **source.canvas(shape.classes),
    }
    return Example(source.layout, tensors, packed=frozenset({"tokens", "halted"}))


def _head_and_gather(example: Example) -> Any:
    norm_weight, norm_bias, weight, bias = (example[name] for name in HEAD)
    halting = exit_head(
        example["tokens"],
        norm_weight,
        norm_bias,
        weight,
        bias,
        example.layout,
        THRESHOLD,
        eps=plain_exits.EPS,
        canvas=example["canvas"],
    )
    return halting, gather_tokens(example["tokens"], halting, tail="undefined")


EXIT_HEAD = Operation(
    name="exit_head",
    shown=("tokens", "weight"),
    registered=("exit_head", "gather_tokens"),
    make=_headed,
    ours=_head_and_gather,
    live=_stage_parts,
    plain=(plain_exits.exit_head,),
    arguments=lambda e: (
        e["tokens"],
        *(e[name] for name in HEAD),
        e["canvas"],
        e.layout.cu_seqlens,
        e.layout.cells,
        THRESHOLD,
    ),
    necessary_bytes=lambda e: _stage_bytes(e, nbytes(e["tokens"], *(e[name] for name in HEAD))),
)


def _halted_tokens(source: Source) -> Example:
    """A recorded exit stage, replayed by force."""
    mask, tokens = source.halted(), source.random(source.live, source.shape.dim)
    with use_backend("reference"):
        halting = halt_tokens(tokens, source.layout, 1.0, halted=mask).trim()
    tensors = {
        "tokens": tokens,
        "rows": halting.rows,
        "gradient": source.random(halting.layout.capacity, tokens.shape[1]),
    }
    return Example(source.layout, tensors, packed=frozenset({"tokens", "rows", "gradient"}), halting=halting)


def _survivors(result: Any, example: Example) -> Outputs:
    assert example.halting is not None
    return (result[: example.halting.layout.num_tokens],)


GATHER_TOKENS = Operation(
    name="gather_tokens",
    shown=("tokens", "rows"),
    registered=("gather_tokens",),
    make=_halted_tokens,
    ours=lambda e: gather_tokens(e["tokens"], e.halting, tail="undefined"),  # type: ignore[arg-type]  # never None here
    live=_survivors,
    plain=(plain.gather_tokens,),
    arguments=lambda e: (e["tokens"], e["rows"]),
    # The survivors' rows are read and written; the gradient has their size.
    necessary_bytes=lambda e: nbytes(e["rows"], e["gradient"], e["gradient"]),
    gradients=("tokens",),
    registered_backward=("gather_tokens_backward",),
    backward_bytes=lambda e: nbytes(e["rows"], e["gradient"], e["tokens"]),
)

OPERATIONS = (HALT_TOKENS, EXIT_HEAD, GATHER_TOKENS)
