"""LayerNorm, and the ops of an early exit: the decision with or without its head, compaction, canvas, and the gather of survivors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels import Halting, exit_head, gather_tokens, halt_tokens, ragged_layer_norm, use_backend
from step_kernels.numerics import accumulator

from ..engine import Case
from ..gate import Outputs
from ..options import Options
from .canvas import covered_cells
from .inputs import CLASSES, Example, Source, spread
from .op import Op, nbytes

THRESHOLD, EPS = 0.95, 1e-6
# Logits ahead of the other classes, far below the threshold and far above it: rounding decides nothing, all halt the same tokens.
LOW_LEAD, HIGH_LEAD = 2.5, 12.0
HEAD = ("norm_weight", "norm_bias", "weight", "bias")


def cases(options: Options) -> Iterator[Case]:
    sources = spread(options)
    for op in (LAYER_NORM, HALT_TOKENS, EXIT_HEAD, GATHER_TOKENS):
        yield from op.cases(options, sources)


def leads(source: Source) -> Tensor:
    """fp32 [live, classes]: one class leads. Prefix tokens look confident, so that who forgets to spare them is caught."""
    confident = source.halted | (source.layout.cells[:, 3] == 0)
    classes = torch.arange(CLASSES, device=confident.device)
    first = torch.randint(CLASSES, (source.live, 1), generator=source.generator, device=confident.device)
    return torch.where(confident, HIGH_LEAD, LOW_LEAD)[:, None] * (classes == first)


def with_scores(s: Source) -> Example:
    sizes = {"scores": (s.live, CLASSES), "tokens": (s.live, s.dim)}
    made = s.example({"scores", "tokens", "halted"}, sizes, {"scores": 0.2})
    return made.having({"scores": made["scores"] + leads(s).to(s.dtype), **painted(s)})


def with_head(s: Source) -> Example:
    """Tokens whose logits lead as above, through a head of orthogonal directions of classes.

    LayerNorm takes a token's length away, so a small lead is a token that mostly points away from all classes.
    """
    directions, length = torch.linalg.qr(s.random(s.dim, CLASSES + 1).float()).Q.T, math.sqrt(s.dim)
    share = 0.9 * leads(s) / HIGH_LEAD
    tokens = share @ directions[:-1] + (1 - share.square().sum(1, keepdim=True)).sqrt() * directions[-1]
    made = {
        "tokens": (length * tokens + s.random(*tokens.shape, scale=0.05)).to(s.dtype),
        "norm_weight": 1 + s.random(s.dim, scale=0.02),
        "norm_bias": s.random(s.dim, scale=0.02),
        "weight": (HIGH_LEAD / (0.9 * length) * directions[:-1]).to(s.dtype),
        "bias": s.random(CLASSES, scale=0.1),
    }
    return Example(s.layout, {**made, **painted(s)}, frozenset({"tokens", "halted"}))


def painted(s: Source) -> dict[str, Tensor]:
    return {"halted": s.halted, "background": s.canvas(CLASSES)}


def with_survivors(s: Source) -> Example:
    rows = (~s.halted).nonzero().flatten().to(torch.int32)
    sizes = {"tokens": (s.live, s.dim), "gradient": (rows.shape[0], s.dim)}
    made = s.example({"tokens", "halted", "gradient"}, sizes)
    return made.having({"halted": s.halted, "rows": rows})


def staged(e: Example, decide: Callable[[], Halting]) -> Callable[[], tuple[Halting, Tensor]]:
    def run() -> tuple[Halting, Tensor]:
        halting = decide()
        return halting, gather_tokens(e["tokens"], halting, tail="undefined")

    return run


def decided_by_head(e: Example) -> Callable[[], tuple[Halting, Tensor]]:
    inputs: tuple[Any, ...] = (*e.of("tokens", *HEAD), e.layout, THRESHOLD)
    return staged(e, functools.partial(exit_head, *inputs, eps=EPS, canvas=e["canvas"]))


def replayed(e: Example) -> Callable[[], Tensor]:
    """A recorded stage, by force."""
    with use_backend("reference"):
        halting = halt_tokens(e["tokens"].detach(), e.layout, 1.0, halted=e["halted"])
    halting = halting.trim() if e.layout.trimmed else halting
    return lambda: gather_tokens(e["tokens"], halting, tail="undefined")


def stage_parts(result: tuple[Halting, Tensor], e: Example) -> Outputs:
    found, survivors = result
    assert found.canvas is not None
    live, left = e.layout.num_tokens, found.layout.num_tokens
    packed = found.layout.cells[:left], found.rows[:left]
    decided = found.halted[:live], found.confidence[:live], found.labels[:live]
    return found.layout.cu_seqlens, *packed, *decided, found.canvas, survivors[:left]


def plain_halt(scores: Tensor, tokens: Tensor, *stage: Tensor) -> Outputs:
    """softmax, max, nonzero, index_select."""
    confidence, labels = scores.softmax(1, dtype=accumulator(scores.dtype)).max(1)
    return compacted(confidence, labels, scores, tokens, *stage)


def plain_head(tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, *rest: Tensor) -> Outputs:
    """The same behind LayerNorm and a linear layer; the canvas receives log-probabilities."""
    weight, bias, *stage = rest
    normed = F.layer_norm(tokens, tokens.shape[1:], norm_weight, norm_bias, EPS)
    log_probabilities = F.linear(normed, weight, bias).log_softmax(1, dtype=accumulator(tokens.dtype))
    best, labels = log_probabilities.max(1)
    return compacted(best.exp(), labels, log_probabilities, tokens, *stage)


def compacted(confidence: Tensor, labels: Tensor, values: Tensor, tokens: Tensor, *stage: Tensor) -> Outputs:
    """-> cu_seqlens, cells and rows of the survivors; halted, confidence and labels; canvas and the survivors themselves."""
    canvas, cu_seqlens, cells = stage
    is_block = cells[:, 3] > 0
    confidence, labels = torch.where(is_block, confidence, 0), torch.where(is_block, labels, -1).to(torch.int32)
    halted = confidence > THRESHOLD
    rows, gone = (~halted).nonzero().flatten(), halted.nonzero().flatten()
    before = F.pad((~halted).cumsum(0, dtype=torch.int32), (1, 0))
    cell, position = covered_cells(cells[gone], (canvas.shape[2], canvas.shape[3]))
    canvas.permute(0, 2, 3, 1).view(-1, canvas.shape[1])[cell] = values[gone[position]].to(canvas.dtype)
    decided = rows.to(torch.int32), halted, confidence, labels
    return before[cu_seqlens], cells[rows], *decided, canvas, tokens.index_select(0, rows)


LAYER_NORM = Op(
    "ragged_layer_norm",
    lambda s: s.example({"x"}, {"x": (s.live, s.dim), "weight": (s.dim,), "bias": (s.dim,)}),
    lambda e: lambda: ragged_layer_norm(**e.tensors, eps=EPS, layout=e.layout, tail="undefined"),
    {"PyTorch": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS)},
    lambda e: list(e.tensors.values()),
    bytes=lambda e: 2 * nbytes(e["x"]),
)
HALT_TOKENS = Op(
    "halt_tokens",
    with_scores,
    lambda e: staged(e, lambda: halt_tokens(e["scores"], e.layout, THRESHOLD, canvas=e["canvas"])),
    {"PyTorch": plain_halt},
    lambda e: (*e.of("scores", "tokens", "canvas"), e.layout.cu_seqlens, e.layout.cells),
    view=stage_parts,
)
EXIT_HEAD = Op(
    "exit_head",
    with_head,
    decided_by_head,
    {"PyTorch": plain_head},
    lambda e: (*e.of("tokens", *HEAD, "canvas"), e.layout.cu_seqlens, e.layout.cells),
    view=stage_parts,
)
GATHER_TOKENS = Op(
    "gather_tokens",
    with_survivors,
    replayed,
    {"PyTorch": lambda tokens, rows: tokens.index_select(0, rows)},
    lambda e: e.of("tokens", "rows"),
    view=lambda result, e: (result[: e["rows"].shape[0]],),
    gradients=("tokens",),
    bytes=lambda e: nbytes(*e.of("rows", "gradient", "gradient")),  # the gradient has the survivors' size
)
