"""Rows at each step of a comparison: before anything has run, with the gate's verdict, with ratios, without times."""

from __future__ import annotations

import dataclasses
import math

from ..kernels.schema import NOT_RUN
from ..schema import FAILED, PASSED
from .case import Case
from .gate import Verdict
from .registry import FRONT, Contender
from .schema import ModelRow


def blank_row(case: Case, contender: Contender) -> ModelRow:
    """What is known before anything has run."""
    prefix = case.weights.vit.num_prefix
    traces = case.decisions(contender.family)
    counts = [int(length) - prefix for trace in traces for length in trace.layout.lengths()]
    left = sum(int(length) - prefix for trace in traces for length in trace.final_layout.lengths())
    return ModelRow(
        contender=contender.name,
        family=contender.family,
        variant=None,
        model=case.weights.name,
        batch=case.batch,
        layout=case.kind,
        size=case.size,
        device=case.device.type,
        dtype=case.settings.dtype,
        tokens_mean=sum(counts) / len(counts),
        tokens_min=min(counts),
        tokens_max=max(counts),
        halted_share=1 - left / sum(counts),
        gflops=case.gigaflops(contender.family),
        gate=NOT_RUN,
        problem="not yet",
    )


def judged(row: ModelRow, verdict: Verdict, *, problem: str | None = None) -> ModelRow:
    """The row with the gate's verdict; what an earlier verdict says of free runs stays."""
    return dataclasses.replace(
        row,
        gate=PASSED if verdict.passed else FAILED,
        problem=problem,
        decisions_differ=row.decisions_differ if verdict.decisions_differ is None else verdict.decisions_differ,
        max_error=_finite(verdict.max_error),
        allowed_error=_finite(verdict.allowed_error),
        labels_differ=verdict.labels_differ,
    )


def compared(row: ModelRow, dense: ModelRow | None) -> ModelRow:
    """The row with its ratios to the dense one; none for a part of a model, nor where either was not timed."""
    if dense is None or row.family == FRONT:
        return row
    row = dataclasses.replace(row, flop_reduction=dense.gflops / row.gflops)
    if dense.median_ms is None or row.median_ms is None:
        return row
    speedup = dense.median_ms / row.median_ms
    return dataclasses.replace(row, speedup=speedup, realised=speedup * row.gflops / dense.gflops)


def not_run(row: ModelRow, problem: str) -> ModelRow:
    """The row of a contender that could not be timed."""
    return dataclasses.replace(row, gate=NOT_RUN, problem=problem)


def noted(row: ModelRow, note: str | None) -> ModelRow:
    """The row with one more note, if there is one."""
    return row if note is None else dataclasses.replace(row, note="; ".join(filter(None, (row.note, note))))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
