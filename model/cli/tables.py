"""A census as tables, for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = [
    "RUN",
    "RUN_LABELLED",
    "Table",
    "as_markdown",
    "calibration_error",
    "markdown",
    "run",
    "runs",
    "tables",
    "told",
]

RUN = [
    "pictures",
    "tokens a picture",
    "patches a token",
    "% of patches merged",
    "% halt",
    "% as dense",
    "GFLOPs",
    "GFLOPs, dense",
]
RUN_LABELLED = ["% right", "% right, dense", "mIoU", "mIoU, dense"]
Counts = dict[str, list[int]]  # of `census.FIELDS`, by exit, the end last
Value = str | int | float | None


class Table(NamedTuple):
    """Rows under a header; numbers are numbers, so that a page can sort them. Percentages are of what the header says."""

    key: str
    title: str
    note: str
    header: list[str]
    rows: list[list[Value]]


def tables(result: dict[str, Any]) -> list[Table]:
    """Those of `step-kernels tokens`; a table without rows is left out, and so are columns that need labels where there are none."""
    whole, labelled = result["all"], result["labels"]
    truth = "labels" if labelled else "the dense model's labels"
    found = [
        Table("sides", "By block side", "Side of the block of patches that became one token.", *kinds(whole, "sides", "side", labelled)),
        Table("exits", "By exit", "Where tokens leave. GFLOPs are a picture's, up to that exit's decision from the one before.", *exits(whole, labelled)),
        Table("classes", "By class", f"The most common class of the block's pixels, by {truth}.", *kinds(whole, "classes", "class", labelled)),
        Table("distances", "By distance to a border", f"Patches from the token to the next one that a border of {truth} runs through.",
              *kinds(whole, "distances", "distance", labelled)),
        Table("calibration", "Confidence of the exits",
              "Tokens that the exit saw, their confidence, and how often its class is the most common one of the block. "
              "ECE: expected calibration error, 15 bins.", *calibration(whole)),
        Table("resolutions", "By resolution", "The same pictures, scaled; accuracy against labels scaled to the nearest pixel.", *runs(result["resolutions"], labelled)),
        Table("thresholds", "By threshold", "One threshold for all exits, or for all sides of the policy; the others as they are.", *runs(result["thresholds"], labelled)),
        Table("images", "Pictures", "Sorted by the column whose head is pressed.", *images(result["images"], labelled)),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def kinds(whole: dict[str, Any], kind: str, name: str, labelled: bool) -> tuple[list[str], list[list[Value]]]:
    """A row for each side, class or distance."""
    header = [name, "tokens", "% of tokens", "% of patches", "patches a token", "% halt", "% as dense"]
    header += ["% of one class", "% right, halted", "% right, others", "% right, dense"] if labelled else []
    every, rows = whole[kind].values(), list[list[Value]]()
    for key, own in whole[kind].items():
        tokens = sum(own["tokens"])
        rows.append([f"{key} x {key}" if kind == "sides" else key, tokens])
        rows[-1] += [share(tokens, total(every, "tokens")), share(sum(own["patches"]), total(every, "patches"))]
        rows[-1] += [ratio(sum(own["patches"]), tokens), share(sum(own["tokens"][:-1]), tokens)]
        rows[-1] += [share(sum(own["agreeing"]), sum(own["pixels"]))]
        if labelled:
            halted, stayed = slice(None, -1), slice(-1, None)
            accuracies = (share(sum(own["right"][those]), sum(own["labelled"][those])) for those in (halted, stayed))
            all_labelled = sum(own["labelled"])
            rows[-1] += [share(sum(own["common"]), all_labelled), *accuracies]
            rows[-1] += [share(sum(own["dense_right"]), all_labelled)]
    return header, rows


def exits(whole: dict[str, Any], labelled: bool) -> tuple[list[str], list[list[Value]]]:
    """A row for each exit, and for the end."""
    header = ["leaves", "tokens", "% of tokens", "% of patches", "% as dense"]
    header += ["% right", "% right, dense"] if labelled else []
    every, rows = whole["sides"].values(), list[list[Value]]()
    for place, block in enumerate((*whole["blocks"], None)):
        own = {name: sum(counts[name][place] for counts in every) for name in next(iter(every))}
        rows.append(["at the end" if block is None else f"after block {block}", own["tokens"]])
        rows[-1] += [share(own[name], total(every, name)) for name in ("tokens", "patches")]
        rows[-1] += [share(own["agreeing"], own["pixels"])]
        if labelled:
            rows[-1] += [share(own[name], own["labelled"]) for name in ("right", "dense_right")]
        rows[-1] += [whole["gflops"][place] / whole["pictures"]]
    return [*header, "GFLOPs"], rows


def calibration(whole: dict[str, Any]) -> tuple[list[str], list[list[Value]]]:
    """A row for each exit."""
    rows = list[list[Value]]()
    for block, bins in whole["bins"].items():
        count, confidence, right = (sum(column) for column in zip(*bins, strict=True))
        rows.append(
            [f"after block {block}", int(count), share(confidence, count), share(right, count), calibration_error(bins)]
        )
    return ["exit", "tokens", "confidence, %", "right, %", "ECE, %"], [row for row in rows if row[1]]


def calibration_error(bins: Iterable[Sequence[float]]) -> float | None:
    """Expected calibration error in percent (Guo et al., arXiv 1706.04599) of (tokens, sum of confidences, right ones) by bin."""
    rows = list(bins)
    return share(sum(abs(right - confidence) for _, confidence, right in rows), sum(count for count, _, _ in rows))


def runs(found: Sequence[dict[str, Any]], labelled: bool) -> tuple[list[str], list[list[Value]]]:
    """A row for each resolution or threshold."""
    blocks = found[0]["blocks"] if found else ()
    header = ["", *RUN, *(RUN_LABELLED if labelled else []), *(f"% halt after block {block}" for block in blocks)]
    rows = list[list[Value]]()
    for own in found:
        tokens = total(own["sides"].values(), "tokens")
        halted = (sum(counts["tokens"][place] for counts in own["sides"].values()) for place in range(len(blocks)))
        rows.append([own["name"], *run(own, labelled), *(share(count, tokens) for count in halted)])
    return header, rows


def run(own: dict[str, Any], labelled: bool) -> list[Any]:
    """Values of `RUN` and `RUN_LABELLED`."""
    every, pictures = own["sides"].values(), own["pictures"]
    tokens = total(every, "tokens")
    row: list[Any] = [pictures, tokens / pictures, ratio(total(every, "patches"), tokens)]
    single = sum(own["sides"].get("1", {"patches": []})["patches"])
    row += [share(total(every, "patches") - single, total(every, "patches"))]
    row += [share(sum(sum(counts["tokens"][:-1]) for counts in every), tokens)]
    row += [share(total(every, "agreeing"), total(every, "pixels"))]
    row += [sum(own["gflops"]) / pictures, own["dense_gflops"] / pictures]
    if labelled:
        row += [share(total(every, name), total(every, "labelled")) for name in ("right", "dense_right")]
        row += [accuracy["miou"] for accuracy in own["accuracy"]]
    return row


def images(found: Sequence[dict[str, Any]], labelled: bool) -> tuple[list[str], list[list[Value]]]:
    """A row for each picture."""
    header = ["picture", "width", "height", "tokens", "patches a token", "% halt", "GFLOPs", "% as dense"]
    rows = list[list[Value]]()
    for own in found:
        tokens = sum(own["tokens"])
        rows.append([own["name"], own["width"], own["height"], tokens, ratio(sum(own["patches"]), tokens)])
        rows[-1] += [
            share(sum(own["tokens"][:-1]), tokens),
            own["gflops"],
            share(sum(own["agreeing"]), sum(own["pixels"])),
        ]
        if labelled:
            rows[-1] += [share(sum(own[name]), sum(own["labelled"])) for name in ("right", "dense_right")]
    return [*header, *(["% right", "% right, dense"] if labelled else [])], rows


def total(every: Iterable[Counts], name: str) -> int:
    return sum(sum(counts[name]) for counts in every)


def share(part: float, whole: float) -> float | None:
    """Percent; None of nothing."""
    return 100 * part / whole if whole else None


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def told(value: Value) -> str:
    """As a reader sees it."""
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 9.95 else f"{value:.2f}" if value >= 0.1 or not value else f"{value:.2g}"
    return "-" if value is None else value if isinstance(value, str) else f"{value:,}"


def as_markdown(table: Table) -> str:
    """The table in a page of Markdown."""
    return markdown([table.header, *([told(value) for value in row] for row in table.rows)])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
