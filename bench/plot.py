"""Plots of one machine's results: speed-ups, and times of an image. What was not measured is not drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .ratios import baseline_of, comparisons, counts, flop_reduction, ratio, speedup
from .result import Row, Run

BLUE, GREY = "#0072b2", "#8a93a0"


class Bar(NamedTuple):
    """A number of one contender, what p20 and p80 make of it, and for a speed-up what the FLOPs would allow."""

    row: Row
    value: float
    low: float
    high: float
    fewer: float | None = None


def draw(runs: Mapping[str, Run], folder: Path) -> None:
    """Writes speedup.png and time.png of whole models into the folder, or says on stderr why not."""
    speeds, times = bars_of(row for run in runs.values() for row in run.rows if "vit" in row.shape)
    if speeds:
        machine = next(iter(runs.values())).environment["device"]
        try:
            save(speeds, f"speed-up, {machine} (thick line: what the fewer FLOPs allow)", folder / "speedup.png")
            save(times, f"ms per image, {machine}", folder / "time.png")
        except ImportError:
            print("no plots: pip install matplotlib", file=sys.stderr)


def bars_of(rows: Iterable[Row]) -> tuple[list[Bar], list[Bar]]:
    """Speed-ups, without the baselines' own, and milliseconds per image, in the order of the rows."""
    speeds, times = list[Bar](), list[Bar]()
    for contenders in comparisons(rows):
        baseline = baseline_of(contenders)
        for row in filter(counts, contenders):
            times.append(Bar(row, *((ms or 0) / row.shape["batch"] for ms in (row.median_ms, row.p20_ms, row.p80_ms))))
            if baseline and row is not baseline and speedup(row, baseline):
                speeds.append(Bar(row, *ratio(baseline, row), flop_reduction(row, baseline)))
    return speeds, times


def title(row: Row) -> str:
    return ", ".join([row.case, *(f"{key} {value}" for key, value in row.shape.items())])


def save(bars: Sequence[Bar], label: str, path: Path) -> None:
    """One bar a contender, under the name of its comparison; the same results give the same file. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    lines = len(bars) + 1.3 * len({title(bar.row) for bar in bars})
    figure = Figure(figsize=(9.0, 0.3 * lines + 1.2), layout="constrained")
    axis, place, names = figure.subplots(), 0.0, dict[float, str]()
    for comparison, same in groupby(bars, key=lambda bar: title(bar.row)):
        axis.text(0, place, comparison, fontsize=9, fontweight="bold", va="center")
        for bar in same:
            place += 1.0
            names[place] = bar.row.contender
            axis.barh(place, bar.value, height=0.75, color=BLUE if bar.row.ours else GREY)
            axis.plot([bar.low, bar.high], [place, place], color="black", linewidth=1.2)
            axis.text(bar.high, place, f"  {bar.value:.3g}", fontsize=8.5, va="center")
            if bar.fewer is not None:
                axis.plot([bar.fewer] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2.2)
        place += 1.3
    axis.set_yticks(list(names), list(names.values()), fontsize=8.5)
    axis.set_ylim(place, -0.7)
    axis.set_xlabel(f"{label}; thin line: p20 to p80; blue: step_kernels", fontsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140, metadata={"Software": None})
