"""Exit stages: decide (``decision.py``, or ``head.py`` from tokens), compact and paint (``compaction.py``), gather (``gather.py``).

Equivalent PyTorch: ``reference/halting.py``. One stage is two launches, three with ``keep_per_class``, and one more for the tokens; no sort, no
atomics, no host sync. The decision stores per token its confidence, label and whether it halts, and per block of rows the survivors'
number; everything after it reads only those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import OPTIONS, ceil_div, on_device_of, power_of_2, stride
from . import compaction, decision, gather, head

Outcome = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
NO_STRIDES = (0, 0, 0, 0)


class Decisions(NamedTuple):
    """What the deciding kernels store: one entry per row, and the survivors of every ``counted`` rows."""

    confidence: Tensor
    labels: Tensor
    halted: Tensor
    counts: Tensor
    counted: int


def halt_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    threshold: float,
    threshold_tensor: Tensor | None,
    softmax: bool,
    keep_per_class: int,
    forced: Tensor | None,
    values: Tensor,
    canvas: Tensor | None,
) -> Outcome:
    limit = threshold if threshold_tensor is None else threshold_tensor
    ranked = bool(keep_per_class) and forced is None
    capacity, num_classes = cells.shape[0], scores.shape[1]
    rows = decision.DECIDE_ROWS
    decisions = _empty_decisions(cells, decision.KEEP_ROWS if ranked else rows)
    with on_device_of(scores):
        if capacity:
            decision.decide_kernel[(ceil_div(capacity, rows),)](
                *decisions[:4], scores, forced, limit, cu_seqlens, cells,
                scores.stride(0), stride(forced), cu_seqlens.shape[0] - 1, capacity, num_classes,
                SOFTMAX=softmax, DEVICE_THRESHOLD=threshold_tensor is not None, RANKED=ranked, ROWS=rows,
                CLASSES=min(power_of_2(num_classes), decision.DECIDE_CLASSES), **OPTIONS,
            )  # fmt: skip
        return _conclude(decisions, ranked, limit, keep_per_class, cu_seqlens, cells, values, canvas)


def exit_head(
    tokens: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    cu_seqlens: Tensor,
    cells: Tensor,
    threshold: float,
    threshold_tensor: Tensor | None,
    keep_per_class: int,
    forced: Tensor | None,
    canvas: Tensor | None,
) -> Outcome:
    limit = threshold if threshold_tensor is None else threshold_tensor
    ranked = bool(keep_per_class) and forced is None
    capacity, (num_classes, dim) = cells.shape[0], weight.shape
    tiles = head.head_tiles(num_classes, tokens.dtype)
    decisions = _empty_decisions(cells, decision.KEEP_ROWS if ranked else tiles["ROWS"])
    with on_device_of(tokens):
        if capacity:
            head.head_kernel[(ceil_div(capacity, tiles["ROWS"]),)](
                *decisions[:4], canvas,
                (tokens, norm_weight, norm_bias, weight, bias), forced, limit, cu_seqlens, cells,
                (tokens.stride(0), stride(norm_weight), stride(norm_bias), *weight.stride(), stride(bias)),
                stride(forced), NO_STRIDES if canvas is None else canvas.stride(),
                eps, cu_seqlens.shape[0] - 1, capacity, dim, num_classes,
                DEVICE_THRESHOLD=threshold_tensor is not None, RANKED=ranked, **tiles, **OPTIONS,
            )  # fmt: skip
        return _conclude(decisions, ranked, limit, keep_per_class, cu_seqlens, cells, None, canvas)


def _empty_decisions(cells: Tensor, counted: int) -> Decisions:
    capacity = cells.shape[0]
    return Decisions(
        cells.new_empty(capacity, dtype=torch.float32),
        cells.new_empty(capacity),
        cells.new_empty(capacity, dtype=torch.bool),
        cells.new_empty(ceil_div(capacity, counted)),
        counted,
    )


def _conclude(
    decisions: Decisions,
    ranked: bool,
    threshold: float | Tensor,
    keep_per_class: int,
    cu_seqlens: Tensor,
    cells: Tensor,
    values: Tensor | None,
    canvas: Tensor | None,
) -> Outcome:
    """Rank if need be, compact, paint ``values`` (None: what already lies in each block's top-left cell of the canvas)."""
    confidence, labels, halted, counts, counted = decisions
    batch_size, capacity = cu_seqlens.shape[0] - 1, cells.shape[0]
    new_cu_seqlens = torch.empty_like(cu_seqlens)
    new_cells, rows = cells.new_empty(capacity, 4), cells.new_empty(capacity)
    outcome = (new_cu_seqlens, new_cells, rows, halted, confidence, labels)
    if capacity == 0:
        new_cu_seqlens.zero_()
        return outcome
    on_device = isinstance(threshold, Tensor)
    if ranked:
        decision.keep_kernel[(ceil_div(capacity, counted),)](
            halted, counts, confidence, labels, threshold, cu_seqlens, cells, batch_size, capacity, keep_per_class,
            DEVICE_THRESHOLD=on_device, ROWS=counted, RIVALS=decision.KEEP_RIVALS, **OPTIONS,
        )  # fmt: skip
    if canvas is not None and canvas.numel() == 0:
        canvas = None
    channels = 1 if canvas is None else canvas.shape[1]
    painters = 0 if canvas is None else ceil_div(capacity, compaction.PAINT_TOKENS)
    pack_rows = max(compaction.PACK_ROWS, counted)  # whole blocks of counted rows
    compaction.compact_kernel[(ceil_div(capacity, pack_rows) + batch_size + 1 + painters,)](
        new_cu_seqlens, new_cells, rows, canvas,
        values, halted, counts, confidence, labels, threshold, cu_seqlens, cells,
        NO_STRIDES if canvas is None else canvas.stride(), stride(values), batch_size, capacity, channels,
        DEVICE_THRESHOLD=on_device, COUNTED=counted, ROWS=pack_rows, BLOCK=compaction.SUM_BLOCK,
        TOKENS=compaction.PAINT_TOKENS, CELLS=compaction.PAINT_CELLS,
        CHANNELS=min(power_of_2(channels), compaction.PAINT_CHANNELS), **OPTIONS,
    )  # fmt: skip
    return outcome


def gather_tokens(tokens: Tensor, rows: Tensor, cu_seqlens: Tensor | None, fill_tail: bool) -> Tensor:
    capacity, width = rows.shape[0], tokens.shape[1]
    out = tokens.new_empty(capacity, width)
    if out.numel() == 0:
        return out
    tiles = _gather_tiles(width)
    with on_device_of(tokens):
        gather.gather_kernel[(ceil_div(capacity, tiles["ROWS"]),)](
            out, tokens, rows, cu_seqlens, tokens.stride(0), _last(cu_seqlens), capacity, width,
            FILL_TAIL=fill_tail, **tiles, **OPTIONS,
        )  # fmt: skip
    return out


def gather_tokens_backward(grad: Tensor, rows: Tensor, cu_seqlens: Tensor | None, capacity: int) -> Tensor:
    width = grad.shape[1]
    out = grad.new_empty(capacity, width)
    if out.numel() == 0:
        return out
    tiles = _gather_tiles(width)
    with on_device_of(grad):
        gather.gather_backward_kernel[(ceil_div(capacity, tiles["ROWS"]),)](
            out, grad, rows, cu_seqlens, *grad.stride(), _last(cu_seqlens), rows.shape[0], capacity, width,
            **tiles, **OPTIONS,
        )  # fmt: skip
    return out


def _gather_tiles(width: int) -> dict[str, int]:
    columns = min(power_of_2(width), gather.GATHER_COLUMNS)
    return {"ROWS": max(1, min(gather.GATHER_ELEMENTS // columns, gather.GATHER_ROWS)), "COLUMNS": columns}


def _last(cu_seqlens: Tensor | None) -> int:
    """Index of the live row count."""
    return 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
