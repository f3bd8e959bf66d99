"""The rows of `python -m bench kernels` as a table for the terminal and in Markdown, from the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import NOTHING, _number, _times
from ..schema import FAILED, PASSED
from .contenders import FORWARD
from .schema import KernelResult, KernelRow

HEADINGS = ("op", "contender", "gate", "MB", "ms (p20 - p80)", "GB/s", "of copy", "TFLOP/s", "vs eager", "extra MB")
LEFT = 3  # columns of text


def cells(row: KernelRow) -> tuple[str, ...]:
    """One row's cells; what a clock has touched is left out when the row did not pass its gate."""
    time = NOTHING
    if row.median_ms is not None:
        time = f"{_number(row.median_ms)} ({_number(row.p20_ms)} - {_number(row.p80_ms)})"
    return (
        row.op if row.direction == FORWARD else f"{row.op}, {row.direction}",
        row.contender if row.floor is None else f"{row.contender} ({row.floor})",
        row.gate,
        _number(row.necessary_bytes / 1e6),
        time,
        _number(row.gigabytes_per_second),
        NOTHING if row.share_of_copy is None else f"{row.share_of_copy:.0%}",
        _number(row.teraflops_per_second),
        _times(row.speedup),
        NOTHING if row.extra_memory_bytes is None else _number(row.extra_memory_bytes / 1e6),
    )


def plain_table(rows: Sequence[KernelRow]) -> str:
    """Aligned columns, a line of sizes above each op's rows."""
    lines = [HEADINGS, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    texts = [
        "  ".join(
            text.ljust(width) if column < LEFT else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    table = [texts[0], "-" * max(len(text) for text in texts)]
    before = None
    for row, text in zip(rows, texts[1:], strict=True):
        if row.variant != before:
            table.append(f"[{row.variant}]")
        before = row.variant
        table.append(text)
    return "\n".join(table)


def markdown_table(result: KernelResult) -> str:
    """A table for the README: what was measured on which machine, the rows, and why some have no time."""
    environment, settings = result.environment, result.settings
    processor = environment["gpu"] or environment["cpu"]
    commit = NOTHING if environment["commit"] is None else environment["commit"][:10]
    changes = " with uncommitted changes" if environment["dirty"] else ""
    headings = ("sizes", *HEADINGS)
    left = LEFT + 1
    lines = [
        f"Width of ViT-{settings['model'][0].upper()}, {settings['size']} px, batch {settings['batch']}, "
        f"{settings['classes']} classes, {settings['dtype']}, {processor}, threads: {environment['threads']}, "
        f"torch {environment['torch']}, commit {commit}{changes}, {environment['date'][:10]}"
        f"{copy_bandwidth(result.rows)}:",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "|".join("---" if column < left else "---:" for column in range(len(headings))) + "|",
        *("| " + " | ".join((row.variant, *cells(row))) + " |" for row in result.rows),
    ]
    problems = problem_lines(result.rows)
    if problems:
        lines += ["", *(f"- {line}" for line in problems)]
    return "\n".join(lines)


def copy_bandwidth(rows: Sequence[KernelRow]) -> str:
    """The copies' rates as the end of a sentence; empty where nothing was timed."""
    rates = [row.copy_gigabytes_per_second for row in rows if row.copy_gigabytes_per_second is not None]
    if not rates:
        return ""
    low, high = _number(min(rates)), _number(max(rates))
    return f", a copy reaches {low if low == high else f'{low} to {high}'} GB/s"


def problem_lines(rows: Sequence[KernelRow]) -> list[str]:
    """What the rows that did not pass have to say: one line per reason, with the ops that it holds for."""
    ops: dict[str, list[str]] = {}
    for row in rows:
        if row.gate != PASSED:
            ops.setdefault(f"{row.contender}, {row.gate}: {_reason(row)}", []).append(cells(row)[0])
    return [f"{reason} ({'; '.join(dict.fromkeys(names))})" for reason, names in ops.items()]


def _reason(row: KernelRow) -> str:
    if row.gate != FAILED:
        return row.problem or ""
    error = "not finite" if row.max_error is None else f"{row.max_error:.1e}"
    allowed = "nothing" if row.allowed_error is None else f"{row.allowed_error:.1e}"
    return f"error {error} where {allowed} is allowed" + (f", {row.problem}" if row.problem else "")
