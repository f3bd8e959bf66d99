"""The summary of one machine's results in Markdown: bars, and the abstract's figures beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.bars import Bar
from ..notes import BUSY_NOTE
from ..report import NOTHING, _number
from . import paper
from .bars import all_bars
from .results import Evidence

SPREAD = (
    "In brackets: the ratio with p20 and p80 of both times in the place of their medians, the least and the most favourable way; no "
    "confidence interval."
)


def summary(evidence: Evidence) -> str:
    """Machine, bars, figures."""
    return "\n\n".join([heading(evidence), bars_table(all_bars(evidence)), figures_table(evidence)])


def heading(evidence: Evidence) -> str:
    """Which machine, which commits."""
    environment = evidence.environment
    processor = environment["gpu"] or environment["cpu"]
    commits = dict.fromkeys(
        (result.environment["commit"] or "no commit")[:10]
        + (" with uncommitted changes" if result.environment["dirty"] else "")
        for result in evidence.results()
    )
    return (
        f"{processor}, cores: {environment['cores']}, threads: {environment['threads']}, torch {environment['torch']}, "
        f"commit {', '.join(commits)}{_busy(evidence)}:"
    )


def _busy(evidence: Evidence) -> str:
    busy = any(note.startswith(BUSY_NOTE) for result in evidence.results() for note in result.notes)
    return "; busy with other work while it measured" if busy else ""


def bars_table(bars: Sequence[Bar]) -> str:
    """A row for each bar that was measured, its spread in brackets where there is one; for each one of which the rows say why it was not;
    and one row that names the others."""
    measured = "measured" + (" (by p20 and p80)" if any(bar.spread is not None for bar in bars) else "")
    lines = [f"| bar | what | {measured} | bar | aim | |", "|---|---|---:|---:|---:|---|"]
    for bar in bars:
        if bar.value is None and bar.lacking is None:
            continue
        value, state = NOTHING, f"{bar.state}: {_cell(bar.lacking or '')}"
        if bar.value is not None:
            value, state = _number(bar.value), bar.state
            if bar.spread is not None:
                value += f" ({_number(bar.spread[0])} - {_number(bar.spread[1])})"
        sign = "at most " if bar.at_most else ""
        cells = (bar.number, bar.what, value, f"{sign}{bar.bar:g}", f"{bar.aim:g}", state)
        lines.append("| " + " | ".join(cells) + " |")
    missing = not_measured(bars)
    if missing:
        lines.append(f"| {missing} | | {paper.NOT_MEASURED} | | | |")
    if any(bar.spread is not None for bar in bars):
        lines += ["", SPREAD]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """On one line and without what ends a cell."""
    return " ".join(text.split()).replace("|", "/")


def not_measured(bars: Sequence[Bar]) -> str:
    """The bars of which nothing is measured, as "P1 - P4, P6", then those of which a part is missing; empty for none.

    Those that say why they were not measured are left out.
    """
    whole, named = [], []
    for number in dict.fromkeys(bar.number for bar in bars):
        own = [bar for bar in bars if bar.number == number]
        missing = sum(bar.value is None and bar.lacking is None for bar in own)
        if missing == len(own):
            whole.append(int(number.removeprefix("P")))
        elif missing:
            named.append(f"{missing} of {len(own)} parts of {number}")
    return ", ".join([*_ranges(whole), *named])


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Rising numbers, neighbours joined."""
    joined: list[list[int]] = []
    for number in numbers:
        if joined and number == joined[-1][-1] + 1:
            joined[-1].append(number)
        else:
            joined.append([number])
    return [f"P{own[0]}" if len(own) == 1 else f"P{own[0]} - P{own[-1]}" for own in joined]


def figures_table(evidence: Evidence) -> str:
    """The seven figures of the abstract of STEP beside ours."""
    row = paper.main_row(evidence, paper.STEP)
    headings = ["the paper's abstract", "published", f"ours, ViT-L, {paper.SIZE} px, batch {paper.BATCH}, GPU"]
    if row is not None:
        where = "GPU" if row.device == "cuda" else "CPU"
        headings.append(f"ours, ViT-{row.model[0].upper()}, {row.size} px, batch {row.batch}, {where}")
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    for figure in paper.FIGURES:
        cells = [figure.what, figure.published, paper.ours(figure, evidence)]
        cells += [paper.ours_of_the_main_job(figure, evidence)] if row is not None else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
