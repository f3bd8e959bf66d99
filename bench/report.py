"""Rows as text: an aligned table for the terminal and a Markdown table for the README, from the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from .schema import FAILED, Result, Row

HEADINGS = (
    "contender",
    "gate",
    "tokens/image",
    "halted",
    "GFLOPs/image",
    "ms/batch (p20 - p80)",
    "images/s",
    "speed-up",
    "fewer FLOPs",
    "realised",
)
NOTHING = "-"


def cells(row: Row) -> tuple[str, ...]:
    """The table's cells of one row; what a clock has touched is left out when the row failed its gate."""
    tokens = f"{row.tokens_mean:.0f}"
    if row.tokens_min != row.tokens_max:
        tokens += f" ({row.tokens_min} - {row.tokens_max})"
    time = NOTHING
    if row.median_ms is not None:
        time = f"{_number(row.median_ms)} ({_number(row.p20_ms)} - {_number(row.p80_ms)})"
    return (
        row.provider,
        row.gate,
        tokens,
        f"{row.halted_share:.0%}",
        _number(row.gflops),
        time,
        _number(row.images_per_second),
        _times(row.speedup),
        _times(row.flop_reduction),
        NOTHING if row.realised is None else f"{row.realised:.2f}",
    )


def plain_table(rows: Sequence[Row]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [HEADINGS, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    texts = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(len(text) for text in texts)
    return "\n".join([texts[0], rule, *texts[1:]])


def markdown_table(result: Result) -> str:
    """The README's table: what was measured on which machine, then the rows."""
    environment, settings = result.environment, result.settings
    processor = environment["gpu"] or environment["cpu"]
    commit = NOTHING if environment["commit"] is None else environment["commit"][:10]
    changes = " with uncommitted changes" if environment["dirty"] else ""
    lines = [
        f"ViT-{settings['model'][0].upper()}/16, {settings['size']} px, batch {settings['batch']}, "
        f"{settings['dtype']}, {processor}, threads: {environment['threads']}, torch {environment['torch']}, "
        f"commit {commit}{changes}, {environment['date'][:10]}:",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "|".join("---" if column == 0 else "---:" for column in range(len(HEADINGS))) + "|",
        *("| " + " | ".join(cells(row)) + " |" for row in result.rows),
    ]
    return "\n".join(lines)


def gate_line(row: Row) -> str:
    """One sentence per contender: is its output right, by how much not, and does it decide alike when running free."""
    error = "not finite" if row.max_error is None else f"{row.max_error:.1e}"
    if row.allowed_error is None:
        limit = "(the oracle's own scores are not finite)"
    else:
        sign = ">" if row.max_error is None or row.max_error > row.allowed_error else "<="
        limit = f"{sign} {row.allowed_error:.1e} allowed"
    labels = "labels equal" if row.labels_differ == 0 else f"{row.labels_differ} labels differ"
    text = f"gate {row.provider}: {row.gate}, max error {error} {limit}, {labels}"
    if row.decisions_differ is not None:
        text += f"; running free, {row.decisions_differ:.3%} of its decisions differ"
    return text + (", not timed" if row.gate == FAILED else "")


def _number(value: float | None) -> str:
    """Three digits or the whole number, whichever is more."""
    if value is None:
        return NOTHING
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"
