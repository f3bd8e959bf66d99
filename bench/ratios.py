"""What rows say of one another. Derived when it is asked for, never stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from .result import PASSED, Row, Run

DENSE, COPY = "dense", "copy"
NOT_MEASURED = "not measured"
SPEEDUP = "speed-up"  # as a fact of a row: why there is none


def counts(row: Row | None) -> bool:
    return row is not None and row.gate == PASSED and row.median_ms is not None


def baseline_of(rows: Iterable[Row]) -> Row | None:
    """Dense, or the first contender that is not ours."""
    rivals = [row for row in rows if not row.ours and row.contender != COPY]
    return next((row for row in rivals if row.contender == DENSE), rivals[0] if rivals else None)


def speedup(row: Row | None, baseline: Row | None) -> float | None:
    """None unless both are right and were timed, and compute the same."""
    if row is None or baseline is None or not counts(row) or not counts(baseline) or SPEEDUP in row.facts:
        return None
    return None if row.contender == COPY else (baseline.median_ms or 0) / (row.median_ms or 1)


def flop_reduction(row: Row, baseline: Row | None) -> float | None:
    """None for single ops: all contenders have to do the same."""
    same = baseline is None or not row.gflops or not baseline.gflops or "vit" not in row.shape
    return None if same or baseline is None else (baseline.gflops or 0) / (row.gflops or 1)


def bandwidth(row: Row | None) -> float | None:
    """GB/s of what any implementation must move."""
    return row.gbytes * 1e3 / row.median_ms if row and counts(row) and row.gbytes and row.median_ms else None


@dataclass(frozen=True)
class Goal:
    """One sentence with a number: that of `over` divided by that of `under`; the worst one where several comparisons match.

    Attributes:
        what: the sentence.
        goal, aim: to be reached, and hoped for.
        file: of the rows; empty for what bench does not measure.
        cases: their names.
        over, under: contenders, the fastest one of several.
        where: what shape, device, dtype and cores must be, one of several in a tuple; "command", a pattern that the run's must match.
        number: "ms"; "realised", the ratio of times over that of FLOPs; "peak_bytes"; "logits", peak bytes over those of fp32 logits.
        at_most: less is better.
    """

    what: str
    goal: float
    aim: float
    file: str = ""
    cases: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    number: str = "ms"
    at_most: bool = False

    def measured(self, runs: Mapping[str, Run]) -> str:
        """The worst value with what p20 and p80 make of it, or why there is none."""
        found, cases = list[tuple[float, float, float]](), set[str]()
        for rows in comparisons(runs.get(self.file), self.cases, self.where):
            own = [row for row in rows if row.contender in (*self.over, *self.under)]
            over, under = (fastest(own, names) for names in (self.over, self.under))
            if over is None or under is None or any(row.failed for row in own):
                wrong = next((row for row in own if not counts(row)), None)
                return f"{NOT_MEASURED}: {wrong.contender}: {wrong.problem or wrong.gate}" if wrong else NOT_MEASURED
            found.append(ratio(over, under, self.number))
            cases.add(over.case)
        if not found or cases != set(self.cases):  # the one that is missing may be the worst
            return NOT_MEASURED
        value, low, high = (max if self.at_most else min)(found)
        return f"{value:.3g}" + (f" ({low:.3g} - {high:.3g})" if low != high else "")


def comparisons(run: Run | None, cases: Sequence[str], where: Mapping[str, Any]) -> Iterator[list[Row]]:
    """The rows of each case and shape that count for a goal."""
    conditions = {key: value if isinstance(value, tuple) else (value,) for key, value in where.items()}
    (command,) = conditions.pop("command", ("",))
    if run is None or not re.search(command, run.command):
        return
    for _, same in groupby(run.rows, key=lambda row: (row.case, row.shape)):
        rows = list(same)
        first, cores = rows[0], run.environment.get("cores")
        known = {**first.shape, "device": first.device, "dtype": first.dtype, "cores": cores}
        if first.case in cases and all(known.get(key) in wanted for key, wanted in conditions.items()):
            yield rows


def fastest(rows: Iterable[Row], contenders: Sequence[str]) -> Row | None:
    own = [row for row in rows if row.contender in contenders and counts(row)]
    return min(own, key=lambda row: row.median_ms or 0, default=None)


def ratio(over: Row, under: Row, number: str) -> tuple[float, float, float]:
    """The value, and what it is with p20 and p80 of both times in the place of their medians, the least and the most favourable way."""
    if number == "logits":
        size = math.prod(over.shape[key] for key in ("images", "classes", "pixels", "pixels"))
        return ((over.peak_bytes or 0) / (4 * size),) * 3
    if number == "peak_bytes":
        return ((over.peak_bytes or 0) / (under.peak_bytes or 1),) * 3
    factor = (under.gflops or 1) / (over.gflops or 1) if number == "realised" else 1.0
    times = ((over.median_ms, under.median_ms), (over.p20_ms, under.p80_ms), (over.p80_ms, under.p20_ms))
    value, low, high = (factor * (slow or 0) / (fast or 1) for slow, fast in times)
    return value, low, high
