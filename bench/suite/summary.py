"""What a run of the suite sums up: how its parts went, what the tests say, the bars, and those that there was no time for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evidence.bars import all_bars
from ..evidence.results import Evidence, read
from ..evidence.text import summary
from ..model.bars import Bar
from ..model.measure import USED_UP
from ..model.report import LEFT_OUT
from .gpu_tests import JSON_NAME as GPU_TESTS_JSON
from .parts import Part

FINISHED, FAILED, CUT_SHORT, NOT_RUN = "finished", "FAILED", "cut short", "not run"
INTERRUPTED = "interrupted"
ENOUGH_MINUTES = 30  # for everything
OF_A_BUDGET = re.compile(r"--(compile-)?minutes")  # in what a row says that a budget has cost something


@dataclass(frozen=True)
class Outcome:
    """How one part went.

    Attributes:
        part: name.
        state: "finished", "FAILED" (a gate, a test or the process), "cut short" by the budget or by a user, or "not run".
        seconds: it took.
        problem: why, where it did not finish.
    """

    part: str
    state: str
    seconds: float
    problem: str | None = None


def summed_up(folder: Path, parts: Sequence[Part], outcomes: Sequence[Outcome], minutes: float) -> str:
    """Markdown of a run into a folder; without the folder's path, which may name a person."""
    lines = []
    for outcome in outcomes:
        reason = "" if outcome.problem is None else f": {outcome.problem}"
        lines.append(f"- {outcome.part}: {outcome.state}, {outcome.seconds:.0f} s{reason}")
    counts = test_counts(folder) if any(part.writes == GPU_TESTS_JSON for part in parts) else None
    if counts:
        rest = "" if counts["complete"] else ", the others were not reached"
        lines.append(
            f"- tests: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped{rest}"
        )
        lines += [f"  - FAILED {name}" for name in counts["failures"]]
    evidence: Evidence | None = None
    try:
        evidence = read(folder)
        text = summary(evidence)
    except UsageError as nothing:
        text = f"No results: {str(nothing).replace(str(folder), 'the folder')}"
    short = without_time(parts, outcomes, evidence)
    if short:
        more = max(ENOUGH_MINUTES, 2 * minutes)
        named = "; ".join(f"{bar.number} {bar.what}" for bar in short)
        lines.append(
            f"- bars not measured for lack of time: {named}. `python -m bench suite --minutes {more:g}` has time for them."
        )
    return "\n".join(["# Summary", "", *lines, "", text, ""])


def test_counts(folder: Path) -> dict[str, Any] | None:
    """What the tests have written; None where that is nothing, or broke off in the middle."""
    path = folder / GPU_TESTS_JSON
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return counts if isinstance(counts, dict) else None


def without_time(parts: Iterable[Part], outcomes: Iterable[Outcome], evidence: Evidence | None) -> list[Bar]:
    """The bars without a value that a longer run would give one."""
    found = evidence or Evidence("nothing")
    missing = [bar for bar in all_bars(found) if bar.value is None]
    short: list[Bar] = []
    for part, outcome in zip(parts, outcomes, strict=True):
        ended = outcome.state in (CUT_SHORT, NOT_RUN) and bool(OF_A_BUDGET.search(outcome.problem or ""))
        ended = ended or _ran_out(found, part)
        own = (bar for bar in missing if bar.number in part.bars)
        short += [bar for bar in own if (ended if bar.lacking is None else OF_A_BUDGET.search(bar.lacking))]
    return short


def _ran_out(evidence: Evidence, part: Part) -> bool:
    """Whether a part that ended by itself has left something out for its budgets."""
    if part.name == "kernels" and evidence.kernels is not None:
        return any(OF_A_BUDGET.search(row.problem or "") for row in evidence.kernels.rows)
    notes = evidence.model.notes if part.name == "model" and evidence.model is not None else ()
    return any(note.startswith(f"{LEFT_OUT}, {USED_UP}") for note in notes)
