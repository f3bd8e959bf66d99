"""Rows as Markdown: every number of the documents comes from here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from step_kernels_cli import UsageError

from . import goals, result
from .options import LATEST
from .result import NOT_RUN, REPOSITORY, Row, Run, read, runs_in

# Up to its own end and over no other mark: a lost one must not swallow what is written by hand.
REGION = re.compile(
    r"<!-- (table|goals): (\S+) -->\n((?:(?!<!-- (?:table:|goals:|end of )).)*)<!-- end of \1 -->", re.DOTALL
)
MARK = re.compile(r"<!-- (?:table:|goals:|end of (?:table|goals)).*")


def command(paths: Sequence[Path], write: Sequence[Path]) -> int:
    """Prints results (default: all committed ones), rewrites the regions of documents; UsageError where they are none or must not be mixed."""
    try:
        for path in paths or sorted(each for each in LATEST.parent.glob("*/") if each != LATEST and runs_in(each)):
            runs = {path.name: read(path)} if path.is_file() else runs_in(path)
            if not runs:
                raise ValueError(f"{path} holds no results: run `python -m bench` first")
            if path.is_dir():
                print(f"# {path.name}\n\n{goals_of(runs)}\n")
            print("\n\n".join(map(document, runs.values())))
        for path in write:
            path.write_text(regenerated(path.read_text(encoding="utf-8"), REPOSITORY), encoding="utf-8")
            print(f"{path}: rewritten", file=sys.stderr)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    return 0


def regenerated(text: str, root: Path) -> str:
    """Markdown with its regions `<!-- table: FILE.json -->` and `<!-- goals: FOLDER -->`, paths from `root`, as they must be.

    ValueError for a start without an end or the reverse, and for what `runs_in` refuses.
    """

    def region(found: re.Match[str]) -> str:
        kind, name, _ = found.groups()
        path = root / name
        if kind == "goals":
            content = goals_of(runs_in(path))
        else:
            run = runs_in(path.parent).get(path.name)
            content = document(run) if run else f"{path.name}: {result.NOT_MEASURED}."
        return f"<!-- {kind}: {name} -->\n{content}\n\n<!-- end of {kind} -->"

    alone = MARK.search(REGION.sub("", text))
    if alone is not None:
        raise ValueError(f"expected a start and an end of every region, got {alone.group()!r} alone")
    return REGION.sub(region, text)


def document(run: Run) -> str:
    """Machine, tables, notes."""
    return "\n\n".join(filter(None, [heading([run]), tables(run.rows), "\n".join(f"- {note}" for note in run.notes)]))


def heading(runs: Sequence[Run]) -> str:
    """Which machine, which commits."""
    where = runs[0].environment
    commits = ", ".join(dict.fromkeys((run.environment["commit"] or "unknown")[:10] for run in runs))
    changes = "" if where["clean"] else " with uncommitted changes"
    machine = f"{where['device']}, cores: {where['cores']}, threads: {where['threads']}, torch {where['torch']}"
    machine += f", tiles: {where['tiles']}" if where.get("tiles") else ""
    return f"{machine}, commit {commits}{changes}, {where['date'][:10]}:"


def tables(rows: Iterable[Row]) -> str:
    """One table for each comparison of whole models and one for the sizes of an op: a line for each contender that ran."""
    made = []
    for (case, device, dtype, _), group in groupby(rows, key=lambda row: (row.case, row.device, row.dtype, whole(row))):
        own = list(group)
        common = {key: value for key, value in own[0].shape.items() if all(row.shape.get(key) == value for row in own)}
        lines, missing = list[dict[str, str]](), dict[str, dict[str, None]]()
        for contenders in result.comparisons(own):
            for row in contenders:
                if row.gate == NOT_RUN:
                    missing.setdefault(row.problem or "for no known reason", {})[row.contender] = None
                else:
                    lines.append(line(row, contenders, common))
        title = ", ".join([f"**{case}**", *(f"{key} {value}" for key, value in common.items()), dtype, device])
        reasons = (f"- {'; '.join(names)}: {NOT_RUN}, {reason}" for reason, names in missing.items())
        made += [f"{title}:", markdown(lines) if lines else "", "\n".join(reasons)]
    return "\n\n".join(filter(None, made))


def whole(row: Row) -> str:
    """What makes a table of its own of a comparison of whole models."""
    return str(row.shape) if "vit" in row.shape else ""


def line(row: Row, contenders: Sequence[Row], common: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a row; nothing that a clock has touched where it did not pass."""
    cells = {key: str(value) for key, value in row.shape.items() if key not in common}
    cells |= {"contender": row.contender, "gate": row.gate, **facts(row.facts)}
    if result.counts(row):
        baseline, seconds = result.baseline_of(contenders), (row.median_ms or 1) / 1e3
        images = row.shape["batch"] if whole(row) else None
        speed, fewer = result.speedup(row, baseline), result.flop_reduction(row, baseline)
        moved = result.bandwidth(row)
        copied = next((result.bandwidth(one) for one in contenders if one.contender == result.COPY), None)
        cells |= {
            "GFLOPs/image": number(row.gflops and images and row.gflops / images),
            "ms (p20 - p80)": f"{number(row.median_ms)} ({number(row.p20_ms)} - {number(row.p80_ms)})",
            "images/s": number(images and images / seconds),
            result.SPEEDUP: row.facts.get(result.SPEEDUP) or (f"{speed:.2f}x" if speed else ""),
            "fewer FLOPs": f"{fewer:.2f}x" if fewer else "",
            "realised": number(speed and fewer and speed / fewer),
            "GFLOP/s": "" if images else number(row.gflops and row.gflops / seconds),
            "GB/s": number(moved),
            "of copy": f"{moved / copied:.0%}" if moved and copied else "",
            "peak MB": number(row.peak_bytes and row.peak_bytes / 1e6),
            "syncs": number(row.syncs),
        }
    error = f"error {number(row.error) or 'not finite'} where {number(row.allowed)} is allowed" if row.failed else ""
    return cells | {"note": "; ".join(filter(None, [row.note, row.problem, error])).replace("|", "/")}


def facts(told: Mapping[str, Any]) -> dict[str, str]:
    """What a contender has to say of itself, in columns."""
    cells = {}
    if "tokens_mean" in told:
        mean, low, high = (told[f"tokens_{which}"] for which in ("mean", "min", "max"))
        cells["tokens/image"] = f"{mean:.0f}" + (f" ({low} - {high})" if low != high else "")
    for key, value in told.items():
        if key != result.SPEEDUP and not key.startswith("tokens_"):
            shown = value if isinstance(value, str) else f"{value:.0%}" if "share" in key else number(value)
            cells[key.removesuffix("_share").replace("_", " ")] = shown
    return cells


def goals_of(runs: Mapping[str, Run]) -> str:
    """The goals, and the figures of the paper's abstract, beside what was measured."""
    known, found = list(runs.values()), list[dict[str, str]]()
    for goal in goals.GOALS:
        wanted = f"at {'most' if goal.at_most else 'least'} {goal.goal:g}"
        measured = {"measured (by p20 and p80)": goal.measured(known)}
        found.append({"goal": goal.what, **measured, "wanted": wanted, "hoped for": f"{goal.aim:g}"})
    figures = [{"the paper's abstract": what, "published": figure} for what, figure in goals.FIGURES.items()]
    for title, column in goals.COLUMNS.items():
        for one, own in zip(figures, goals.ours(known, *column), strict=True):
            one[title] = own
    where = heading(known) if runs else "Nothing measured yet:"
    return "\n\n".join([where, markdown(found), goals.NOT_BY_BENCH, markdown(figures)])


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """A table with a column for each key that says something anywhere, the note last."""
    keys = sorted(dict.fromkeys(key for one in lines for key in one), key=lambda key: key == "note")
    keys = [key for key in keys if any(one.get(key) for one in lines)]
    table = [keys, ["---"] * len(keys), *([one.get(key, "") for key in keys] for one in lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)


def number(value: float | None) -> str:
    """Three digits or the whole number, whichever is more; nothing for None."""
    if value is None:
        return ""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3g}"
