"""The rows of `python -m bench model` as a table for the terminal and in Markdown, from the same cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..kernels.schema import NOT_RUN
from ..report import NOTHING, _number, _times
from ..schema import FAILED, PASSED
from .bars import Bar
from .budget import Task
from .case import DENSE, EXITS, MERGED, MERGED_EXITS
from .profile import profile_lines
from .schema import ModelResult, ModelRow

HEADINGS = (
    "contender",
    "gate",
    "GFLOPs/image",
    "ms/batch (p20 - p80)",
    "images/s",
    "speed-up",
    "fewer FLOPs",
    "realised",
    "of floor",
    "peak MB",
    "syncs",
    "kernels",
)
LEFT = 2  # columns of text
LEFT_OUT = "left out"  # how a note begins that names comparisons without rows


def cells(row: ModelRow) -> tuple[str, ...]:
    """One row's cells; what a clock has touched is left out when the row did not pass its gate."""
    time = NOTHING
    if row.median_ms is not None:
        time = f"{_number(row.median_ms)} ({_number(row.p20_ms)} - {_number(row.p80_ms)})"
    return (
        row.contender if row.variant is None else f"{row.contender} ({row.variant})",
        row.gate,
        _number(row.gflops),
        time,
        _number(row.images_per_second),
        _times(row.speedup),
        _times(row.flop_reduction),
        NOTHING if row.realised is None else f"{row.realised:.2f}",
        NOTHING if row.achieved is None else f"{row.achieved:.0%}",
        NOTHING if row.peak_memory_bytes is None else _number(row.peak_memory_bytes / 1e6),
        NOTHING if row.host_syncs is None else str(row.host_syncs),
        NOTHING if row.device_kernels is None else str(row.device_kernels),
    )


def title(rows: Sequence[ModelRow]) -> str:
    """What the rows of one comparison have in common."""
    order = (DENSE, EXITS, MERGED, MERGED_EXITS)  # a later family says more about the layouts
    merged = max(rows, key=lambda row: order.index(row.family) if row.family in order else -1)
    halted = merged.halted_share or max(row.halted_share for row in rows)
    tokens = f"{merged.tokens_mean:.0f}"
    if merged.tokens_min != merged.tokens_max:
        tokens += f" ({merged.tokens_min} to {merged.tokens_max})"
    patches = (merged.size // 16) ** 2
    return (
        f"ViT {merged.model}, {merged.size} px, batch {merged.batch}, {merged.dtype}, {merged.layout} layouts: {tokens} of {patches} "
        f"tokens an image, {halted:.0%} halt early"
    )


def comparisons(rows: Sequence[ModelRow]) -> list[list[ModelRow]]:
    """The rows, one list for each comparison."""
    groups: dict[tuple[str, int, int, str], list[ModelRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.size, row.batch, row.layout), []).append(row)
    return list(groups.values())


def plain_table(rows: Sequence[ModelRow]) -> str:
    """Aligned columns of the rows that ran, a title above each comparison."""
    lines = [HEADINGS, *(cells(row) for row in rows if row.gate != NOT_RUN)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]

    def text(line: Sequence[str]) -> str:
        columns = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(w) if number < LEFT else cell.rjust(w) for number, (cell, w) in columns).rstrip()

    table = [text(HEADINGS), "-" * len(text(HEADINGS))]
    for group in comparisons(rows):
        table.append(f"[{title(group)}]")
        table += [text(cells(row)) for row in group if row.gate != NOT_RUN]
    return "\n".join(table)


def problem_lines(rows: Sequence[ModelRow]) -> list[str]:
    """What the rows that did not pass have to say: one line per reason."""
    everywhere = Counter(row.contender for row in rows)
    who: dict[str, list[ModelRow]] = {}
    for row in rows:
        if row.gate != PASSED:
            who.setdefault(
                f"not run: {row.problem}" if row.gate == NOT_RUN else f"{FAILED}: {_failure(row)}", []
            ).append(row)
    lines = []
    for reason, own in who.items():
        times = Counter(row.contender for row in own)
        names = [
            row.contender
            if times[row.contender] == everywhere[row.contender]
            else f"{row.contender} at {_where(row, rows)}"
            for row in own
        ]
        lines.append(f"{reason} ({'; '.join(dict.fromkeys(names))})")
    return lines


def note_lines(rows: Sequence[ModelRow]) -> list[str]:
    """What rows have to say for themselves: one line per note."""
    who: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            who.setdefault(row.note, []).append(row.contender)
    return [f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in who.items()]


def free_lines(rows: Sequence[ModelRow]) -> list[str]:
    """How often contenders of ours halt otherwise than the oracle when nothing is replayed: one line."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row.decisions_differ is not None:
            shares.setdefault(row.contender, []).append(row.decisions_differ)
    if not shares:
        return []
    listed = "; ".join(f"{name} {max(own):.3%}" for name, own in shares.items())
    return [f"running free, share of an image's patches that halt otherwise than in the oracle, at most: {listed}"]


def bar_lines(bars: Sequence[Bar]) -> list[str]:
    """One line per bar that was measured, and one that counts the others."""
    lines = [
        f"{bar.number} {bar.what}: {bar.value:.3g}{_spread(bar)} (bar {bar.bar:g}, aim {bar.aim:g}): {bar.state}"
        for bar in bars
        if bar.value is not None
    ]
    missing = list(dict.fromkeys(bar.number for bar in bars if bar.value is None))
    return lines + ([f"not measured: {', '.join(missing)}"] if missing else [])


def left_out_lines(left_out: Mapping[Task, str]) -> list[str]:
    """The comparisons without rows: one line per reason."""
    tasks: dict[str, list[str]] = {}
    for task, reason in left_out.items():
        tasks.setdefault(reason, []).append(str(task))
    return [f"{LEFT_OUT}, {reason}: {'; '.join(own)}" for reason, own in tasks.items()]


def markdown_table(result: ModelResult) -> str:
    """A table for the README: what was measured on which machine, the rows, and why some have no time."""
    environment = result.environment
    processor = environment["gpu"] or environment["cpu"]
    commit = NOTHING if environment["commit"] is None else environment["commit"][:10]
    changes = " with uncommitted changes" if environment["dirty"] else ""
    lines = [
        f"{processor}, threads: {environment['threads']}, torch {environment['torch']}, commit {commit}{changes}, "
        f"{environment['date'][:10]}:",
    ]
    rule = "|" + "|".join("---" if column < LEFT else "---:" for column in range(len(HEADINGS))) + "|"
    for group in comparisons(result.rows):
        ran = [row for row in group if row.gate != NOT_RUN]
        lines += ["", f"{title(group)}:", "", "| " + " | ".join(HEADINGS) + " |", rule]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in ran]
    rows = result.rows
    further = [*problem_lines(rows), *free_lines(rows), *note_lines(rows), *profile_lines(result.profile)]
    further += [note for note in result.notes if note.startswith(LEFT_OUT)]
    return "\n".join([*lines, *([""] if further else []), *(f"- {line}" for line in further)])


def _spread(bar: Bar) -> str:
    return "" if bar.spread is None else f", {bar.spread[0]:.3g} to {bar.spread[1]:.3g} by p20 and p80,"


def _where(row: ModelRow, rows: Sequence[ModelRow]) -> str:
    """Which comparison, as far as the rows differ in it."""
    several_models, several_sizes = (len({getattr(one, name) for one in rows}) > 1 for name in ("model", "size"))
    model = f"ViT {row.model} " if several_models else ""
    size = f"{row.size} px " if several_sizes else ""
    return f"{model}{size}batch {row.batch} {row.layout}"


def _failure(row: ModelRow) -> str:
    error = "not finite" if row.max_error is None else f"{row.max_error:.1e}"
    allowed = "nothing" if row.allowed_error is None else f"{row.allowed_error:.1e}"
    text = f"error {error} where {allowed} is allowed, {row.labels_differ} labels differ"
    return text + (f", {row.problem}" if row.problem else "")
