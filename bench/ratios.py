"""What rows say of one another. Derived when it is asked for, never stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from .result import PASSED, Row, Run

DENSE, COPY = "dense", "copy"
NOT_MEASURED = "not measured"
SPEEDUP = "speed-up"  # as a fact of a row: why there is none


def counts(row: Row) -> bool:
    return row.gate == PASSED and row.median_ms is not None


def baseline_of(rows: Iterable[Row]) -> Row | None:
    """Dense, or the first contender that is not ours."""
    rivals = [row for row in rows if not row.ours and row.contender != COPY]
    return next((row for row in rivals if row.contender == DENSE), rivals[0] if rivals else None)


def speedup(row: Row, baseline: Row | None) -> float | None:
    """None unless both are right and were timed, and compute the same."""
    if baseline is None or not counts(row) or not counts(baseline) or SPEEDUP in row.facts or row.contender == COPY:
        return None
    return ratio(baseline, row)[0]


def flop_reduction(row: Row, baseline: Row | None) -> float | None:
    """None for single ops: all contenders have to do the same."""
    if baseline is None or "vit" not in row.shape or not row.gflops or not baseline.gflops:
        return None
    return baseline.gflops / row.gflops


def bandwidth(row: Row) -> float | None:
    """GB/s of what any implementation must move."""
    return row.gbytes * 1e3 / row.median_ms if counts(row) and row.gbytes and row.median_ms else None


def comparisons(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The contenders of each case and shape."""
    return (list(same) for _, same in groupby(rows, key=lambda row: (row.case, row.shape)))


def fastest(rows: Iterable[Row], contenders: Sequence[str]) -> Row | None:
    own = [row for row in rows if row.contender in contenders and counts(row)]
    return min(own, key=lambda row: row.median_ms or 0, default=None)


def ratio(over: Row, under: Row, number: str = "ms") -> tuple[float, float, float]:
    """The value, and what it is with p20 and p80 of both times in the place of their medians, the least and the most favourable way."""
    if number == "logits":
        size = math.prod(over.shape[key] for key in ("images", "classes", "pixels", "pixels"))
        return ((over.peak_bytes or 0) / (4 * size),) * 3
    if number == "peak":
        return ((over.peak_bytes or 0) / (under.peak_bytes or 1),) * 3
    factor = (under.gflops or 1) / (over.gflops or 1) if number == "realised" else 1.0
    times = ((over.median_ms, under.median_ms), (over.p20_ms, under.p80_ms), (over.p80_ms, under.p20_ms))
    value, low, high = (factor * (slow or 0) / (fast or 1) for slow, fast in times)
    return value, low, high


@dataclass(frozen=True)
class Goal:
    """One sentence with a number: that of `over` divided by that of `under`, the fastest contenders of these names; the worst case counts."""

    what: str
    goal: float  # to be reached
    aim: float  # hoped for
    cases: Sequence[str]
    over: Sequence[str]
    under: Sequence[str]
    where: Mapping[str, Any] = field(default_factory=dict)  # see `matching`
    number: str = (
        "ms"  # or "realised", times over FLOPs; "peak", of memory; "logits", peak memory over that of fp32 logits
    )
    at_most: bool = False  # less is better

    def measured(self, runs: Iterable[Run]) -> str:
        """The worst value with what p20 and p80 make of it, or why there is none."""
        found, cases = list[tuple[float, float, float]](), set[str]()
        for rows in matching(runs, self.cases, self.where):
            own = [row for row in rows if row.contender in (*self.over, *self.under)]
            over, under = fastest(own, self.over), fastest(own, self.under)
            if over is None or under is None or any(row.failed for row in own):
                wrong = next((row for row in own if not counts(row)), None)
                return f"{NOT_MEASURED}: {wrong.contender}: {wrong.problem or wrong.gate}" if wrong else NOT_MEASURED
            found.append(ratio(over, under, self.number))
            cases.add(over.case)
        if cases != set(self.cases):  # the one that is missing may be the worst
            return NOT_MEASURED
        value, low, high = (max if self.at_most else min)(found)
        return f"{value:.3g}" + (f" ({low:.3g} - {high:.3g})" if low != high else "")


def matching(runs: Iterable[Run], cases: Sequence[str], where: Mapping[str, Any]) -> Iterator[list[Row]]:
    """Comparisons of these cases with this shape, device, dtype, cores and flags; one of several in a tuple."""
    for run in runs:
        flags = {flag: flag in run.command for flag in ("--compile", "--policy given", "--images")}
        for rows in comparisons(run.rows):
            row = rows[0]
            known = {**row.shape, **flags, "device": row.device, "dtype": row.dtype, "cores": run.environment["cores"]}
            wanted = ((known.get(key), one if isinstance(one, tuple) else (one,)) for key, one in where.items())
            if row.case in cases and all(value in values for value, values in wanted):
                yield rows
