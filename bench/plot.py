"""Plots of one machine's results: speed-ups, and times of an image. What was not measured is not drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .ratios import baseline_of, counts, flop_reduction, ratio, speedup
from .result import Row, Run

BLUE, GREY, INK, FAINT = "#0072b2", "#8a93a0", "#1f2430", "#b8bec8"
DRAWN = ("main.json", "model.json", "peers.json")


@dataclass(frozen=True)
class Point:
    """A number of one contender, what p20 and p80 make of it, and for a speed-up what the FLOPs would allow."""

    row: Row
    value: float
    low: float
    high: float
    fewer: float | None = None

    @property
    def title(self) -> str:
        others = [f"{key} {value}" for key, value in self.row.shape.items() if key != "vit"]
        return f"{self.row.case}: ViT-{self.row.shape['vit'][0].upper()}, {', '.join(others)}"


def draw(runs: Mapping[str, Run], folder: Path) -> None:
    """Writes speedup.png and time.png into the folder, or says on stderr why not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
        return
    rows = [row for name in DRAWN if name in runs for row in runs[name].rows if "vit" in row.shape]
    speeds, times = speedups_of(rows), [time_of(row) for row in rows if counts(row)]
    if speeds:
        where = next(iter(runs.values())).environment
        machine = f"{where['device']}, {where['cores']} cores" if where["device"] == where["cpu"] else where["device"]
        label = "speed-up (thick line: what the fewer FLOPs allow; thin: p20 to p80; blue: step_kernels)"
        save(bars(speeds, f"Speed-up, {machine}", label), folder / "speedup.png")
        label = "ms per image (line: p20 to p80; blue: step_kernels)"
        save(bars(times, f"Time of an image, {machine}", label), folder / "time.png")


def save(figure: Any, path: Path) -> None:
    # Without the software's version in it, the same results give the same file on the same machine.
    figure.savefig(path, dpi=140, metadata={"Software": None})


def speedups_of(rows: Iterable[Row]) -> list[Point]:
    """Everybody with a speed-up but the baseline itself, in the order of the rows."""
    found = []
    for _, same in groupby(rows, key=lambda row: (row.case, row.shape)):
        contenders = list(same)
        baseline = baseline_of(contenders)
        for row in contenders:
            if baseline is not None and row is not baseline and speedup(row, baseline) is not None:
                found.append(Point(row, *ratio(baseline, row, "ms"), flop_reduction(row, baseline)))
    return found


def time_of(row: Row) -> Point:
    return Point(row, *((value or 0) / row.shape["batch"] for value in (row.median_ms, row.p20_ms, row.p80_ms)))


def bars(found: Sequence[Point], title: str, label: str) -> Any:
    """One bar a contender, under the name of its comparison."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 0.3 * (len(found) + 1.3 * len({point.title for point in found})) + 1.2
    figure = Figure(figsize=(9.0, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    axis = figure.subplots()
    place, ticks, gap = 0.0, list[tuple[float, str]](), max(point.high for point in found) / 80
    for comparison, same in groupby(found, key=lambda point: point.title):
        axis.text(0, place, comparison, fontsize=9, color=INK, fontweight="bold", va="center")
        for point in same:
            place += 1.0
            axis.barh(place, point.value, height=0.75, color=BLUE if point.row.ours else GREY)
            axis.plot([point.low, point.high], [place, place], color=INK, linewidth=1.2)
            style: dict[str, Any] = {"fontsize": 8.5, "va": "center"}
            if point.fewer is None:
                axis.text(point.high + gap, place, f"{point.value:.3g}", color=INK, **style)
            else:
                axis.plot([point.fewer] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=2.2)
                axis.text(gap, place, f"{point.value:.2f}x", color="white", **style)
            ticks.append((place, point.row.contender))
        place += 1.3
    axis.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axis.set_ylim(place, -0.7)
    axis.set_xlabel(label, fontsize=8.5)
    axis.tick_params(colors=INK, labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    if found[0].fewer is not None:
        axis.axvline(1.0, color=FAINT, linewidth=1, zorder=0)
    return figure
