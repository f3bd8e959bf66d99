"""Exit stages: decide (``decision.py``, or ``head.py`` from tokens), compact and paint (``compaction.py``), gather (``gather.py``).

Equivalent PyTorch: ``reference/halting.py``. One stage is two launches, three with ``keep_per_class``, and one more for the tokens; no sort, no
atomics, no host sync. The decision stores per token its confidence, label and whether it halts, and per block of rows the survivors'
number; everything after it reads only those.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import tuned
from ..common.cells import number_of_sides
from ..common.launch import OPTIONS, architecture, batch_of, ceil_div, input_precision, on_device_of, power_of_2, stride
from ..common.operands import dtype_class
from ..common.remembered import Launch, launch
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
    ranked = bool(keep_per_class) and forced is None
    decisions = _empty_decisions(cells, decision.KEEP_ROWS if ranked else _decide_row(scores)[0])
    with on_device_of(scores):
        if cells.shape[0]:
            given = scores, forced, threshold_tensor, cu_seqlens, cells
            launch(_decide, decisions[:4], given, threshold, softmax, ranked)
        return _conclude(
            decisions, ranked, threshold, threshold_tensor, keep_per_class, cu_seqlens, cells, values, canvas
        )


def _decide(
    confidence: Tensor,
    labels: Tensor,
    halted: Tensor,
    counts: Tensor,
    scores: Tensor,
    forced: Tensor | None,
    threshold_tensor: Tensor | None,
    cu_seqlens: Tensor,
    cells: Tensor,
    threshold: float,
    softmax: bool,
    ranked: bool,
) -> Launch:
    (rows, classes, warps), capacity, num_classes = _decide_row(scores), cells.shape[0], scores.shape[1]
    arguments = (
        confidence, labels, halted, counts,
        scores, forced, threshold if threshold_tensor is None else threshold_tensor, cu_seqlens, cells,
        scores.stride(0), stride(forced), cu_seqlens.shape[0] - 1, capacity, num_classes,
    )  # fmt: skip
    named = {
        "SOFTMAX": softmax,
        "DEVICE_THRESHOLD": threshold_tensor is not None,
        "RANKED": ranked,
        "ROWS": rows,
        "CLASSES": min(power_of_2(num_classes), classes),
        "VECTOR": math.gcd(8, num_classes, scores.stride(0)),
        "num_warps": warps,
    }
    return decision.decide_kernel, (ceil_div(capacity, rows),), arguments, named


def _decide_row(scores: Tensor) -> tuned.Row:
    return tuned.row(scores.device, *row_key("decide", scores)) or decision.DECIDE_ROWS[0]


def row_key(kernel: str, like: Tensor) -> tuple[object, ...]:
    return kernel, dtype_class(like.dtype), *like.shape[1:2]


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
    ranked = bool(keep_per_class) and forced is None
    counted = decision.KEEP_ROWS if ranked else _head_row(tokens, weight)[0]
    decisions = _empty_decisions(cells, counted)
    with on_device_of(tokens):
        if cells.shape[0]:
            parameters = norm_weight, norm_bias, weight, bias
            given = tokens, *parameters, forced, threshold_tensor, cu_seqlens, cells, canvas
            launch(_head, decisions[:4], given, threshold, eps, ranked, input_precision(tokens.dtype))
        return _conclude(
            decisions, ranked, threshold, threshold_tensor, keep_per_class, cu_seqlens, cells, None, canvas
        )


def _head(
    confidence: Tensor,
    labels: Tensor,
    halted: Tensor,
    counts: Tensor,
    tokens: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    forced: Tensor | None,
    threshold_tensor: Tensor | None,
    cu_seqlens: Tensor,
    cells: Tensor,
    canvas: Tensor | None,
    threshold: float,
    eps: float,
    ranked: bool,
    precision: str,
) -> Launch:
    capacity, (num_classes, dim) = cells.shape[0], weight.shape
    tiles = head.head_tiles(num_classes, dim, _head_row(tokens, weight))
    strides = NO_STRIDES if canvas is None else canvas.stride()
    arguments = (
        confidence, labels, halted, counts, canvas,
        (tokens, norm_weight, norm_bias, weight, bias),
        forced, threshold if threshold_tensor is None else threshold_tensor, cu_seqlens, cells,
        (tokens.stride(0), stride(norm_weight), stride(norm_bias), *weight.stride(), stride(bias)),
        stride(forced), strides, eps, cu_seqlens.shape[0] - 1, capacity, dim, num_classes,
    )  # fmt: skip
    named = {
        "DEVICE_THRESHOLD": threshold_tensor is not None,
        "RANKED": ranked,
        "PRECISION": precision,
        "VECTOR": _vector(num_classes, strides),
        **tiles,
    }
    return head.head_kernel, (ceil_div(capacity, tiles["ROWS"]),), arguments, named


def _head_row(tokens: Tensor, weight: Tensor) -> tuned.Row:
    measured = tuned.row(tokens.device, *head_key(tokens, weight))
    return measured or head.row_of(weight.shape[0], weight.shape[1], tokens.dtype, architecture(tokens.device))


def head_key(tokens: Tensor, weight: Tensor) -> tuple[object, ...]:
    return "exit_head", dtype_class(tokens.dtype), *weight.shape


def _vector(channels: int, strides: tuple[int, ...]) -> int:
    """How many channels of a canvas, which starts each cell at a multiple of them, a thread may write at a time."""
    return math.gcd(8, channels, strides[0], *strides[2:])


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
    threshold: float,
    threshold_tensor: Tensor | None,
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
    if ranked:
        limit = threshold if threshold_tensor is None else threshold_tensor
        decision.keep_kernel[(ceil_div(capacity, counted),)](
            halted, counts, confidence, labels, limit, cu_seqlens, cells, batch_size, capacity, keep_per_class,
            DEVICE_THRESHOLD=threshold_tensor is not None, ROWS=counted, RIVALS=decision.KEEP_RIVALS, **OPTIONS,
        )  # fmt: skip
    if canvas is not None and canvas.numel() == 0:
        canvas = None
    given = cells, cu_seqlens, values, canvas, threshold_tensor
    launch(_compact, (*outcome[:3], halted, counts, confidence, labels), given, threshold, counted)
    return outcome


def _compact(
    new_cu_seqlens: Tensor,
    new_cells: Tensor,
    rows: Tensor,
    halted: Tensor,
    counts: Tensor,
    confidence: Tensor,
    labels: Tensor,
    cells: Tensor,
    cu_seqlens: Tensor,
    values: Tensor | None,
    canvas: Tensor | None,
    threshold_tensor: Tensor | None,
    threshold: float,
    counted: int,
) -> Launch:
    batch_size, capacity = cu_seqlens.shape[0] - 1, cells.shape[0]
    grid_rows, grid_cols, channels = (0, 0, 1) if canvas is None else (*canvas.shape[2:], canvas.shape[1])
    strides = NO_STRIDES if canvas is None else canvas.stride()
    vector = _vector(channels, (*strides, stride(values)))
    measured = None if canvas is None else tuned.row(cells.device, *row_key("compact", canvas))
    pack_rows, paint_cells, warps = measured or compaction.COMPACT_ROWS[0]
    painters = batch_size * ceil_div(grid_rows * grid_cols, paint_cells)
    pack_rows = max(pack_rows, counted)  # whole blocks of counted rows
    arguments = (
        new_cu_seqlens, new_cells, rows, canvas, values, halted, counts, confidence, labels,
        threshold if threshold_tensor is None else threshold_tensor, cu_seqlens, cells,
        strides, stride(values), batch_size, capacity, grid_rows, grid_cols, channels,
    )  # fmt: skip
    named = {
        "DEVICE_THRESHOLD": threshold_tensor is not None,
        "COUNTED": counted,
        "ROWS": pack_rows,
        "BLOCK": compaction.SUM_BLOCK,
        "NUM_SIDES": number_of_sides(max(grid_rows, 1), max(grid_cols, 1)),
        "CELLS": paint_cells,
        "CHANNELS": min(power_of_2(channels), compaction.PAINT_CHANNELS, compaction.PAINT_LANES * vector),
        "VECTOR": vector,
        "num_warps": warps,
    }
    grid = (ceil_div(capacity, pack_rows) + batch_size + 1 + painters,)
    return compaction.compact_kernel, grid, arguments, named


def gather_tokens(tokens: Tensor, rows: Tensor, cu_seqlens: Tensor | None, fill_tail: bool) -> Tensor:
    out = tokens.new_empty(rows.shape[0], tokens.shape[1])
    if out.numel() == 0:
        return out
    with on_device_of(tokens):
        launch(_gather, (out,), (tokens, rows, cu_seqlens), fill_tail)
    return out


def _gather(out: Tensor, tokens: Tensor, rows: Tensor, cu_seqlens: Tensor | None, fill_tail: bool) -> Launch:
    capacity, width = out.shape
    tiles = _gather_tiles(tokens)
    arguments = out, tokens, rows, cu_seqlens, tokens.stride(0), batch_of(cu_seqlens), capacity, width
    return gather.gather_kernel, (ceil_div(capacity, tiles["ROWS"]),), arguments, {"FILL_TAIL": fill_tail, **tiles}


def gather_tokens_backward(grad: Tensor, rows: Tensor, cu_seqlens: Tensor | None, capacity: int) -> Tensor:
    width = grad.shape[1]
    out = grad.new_empty(capacity, width)
    if out.numel() == 0:
        return out
    tiles = _gather_tiles(grad)
    with on_device_of(grad):
        gather.gather_backward_kernel[(ceil_div(capacity, tiles["ROWS"]),)](
            out, grad, rows, cu_seqlens, *grad.stride(), batch_of(cu_seqlens), rows.shape[0], capacity, width,
            **tiles, **OPTIONS,
        )  # fmt: skip
    return out


def _gather_tiles(tokens: Tensor) -> dict[str, int]:
    elements, warps = tuned.row(tokens.device, *row_key("gather", tokens)) or gather.GATHER_TILES[0]
    columns = min(power_of_2(tokens.shape[1]), gather.GATHER_COLUMNS)
    rows = max(1, min(elements // columns, gather.GATHER_ROWS))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}
