"""Plots of one machine's results: speed-up over dense, and time of an image. What was not measured is not drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .ratios import baseline_of, counts, flop_reduction, ratio, speedup
from .result import Row, Run

# Okabe and Ito's colours, told apart with any kind of colour vision; one marker fewer, so that no pair of them comes twice.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a93a0", "#3b4252")
MARKERS = "osD^vPX"
INK, FAINT = "#1f2430", "#b8bec8"
DRAWN = ("main.json", "model.json", "peers.json")


@dataclass(frozen=True)
class Point:
    """A number of one contender: where it was measured, the value with p20 and p80, and for a speed-up what the FLOPs would allow."""

    row: Row
    value: float
    low: float
    high: float
    fewer: float | None = None

    @property
    def series(self) -> str:
        """What stays the same when batch or size changes."""
        others = [f"{key} {value}" for key, value in self.row.shape.items() if key not in ("vit", "size", "batch")]
        return ", ".join([f"{self.row.case}: ViT-{self.row.shape['vit'][0].upper()}", *others])

    @property
    def title(self) -> str:
        return f"{self.series}, {self.row.shape['size']} px, batch {self.row.shape['batch']}"


def draw(runs: Mapping[str, Run], folder: Path) -> None:
    """Writes speedup.png and time.png into the folder, or says on stderr why not."""
    rows = [row for name in DRAWN if name in runs for row in runs[name].rows if "vit" in row.shape]
    speeds, times = speedups_of(rows), [time_of(row) for row in rows if counts(row)]
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("no plots: pip install matplotlib", file=sys.stderr)
        return
    if speeds:
        where = next(iter(runs.values())).environment
        machine = f"{where['device']}, {where['cores']} cores" if where["device"] == where["cpu"] else where["device"]
        for name, figure in (
            ("speedup", speedup_figure(speeds, f"Speed-up, {machine}")),
            ("time", bars_figure(times, f"Time of an image, {machine}", "ms per image (line: p20 to p80)")),
        ):
            # Without the software's version in it, the same results give the same file on the same machine.
            figure.savefig(folder / f"{name}.png", dpi=140, metadata={"Software": None})


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


def speedup_figure(found: Sequence[Point], title: str) -> Any:
    """Curves over batch or size where several were measured, bars elsewhere."""
    curves = [
        (along, own)
        for series in dict.fromkeys(point.series for point in found)
        for along, other in (("batch", "size"), ("size", "batch"))
        if (own := most_of([point for point in found if point.series == series], along, other))
    ]
    drawn = [point for _, own in curves for point in own]
    others = [point for point in found if point not in drawn]
    label = "speed-up (thick line: fewer FLOPs; thin: p20 to p80)"
    if not curves:
        return bars_figure(others, title, label)
    heights = [3.4] * len(curves) + ([height_of(others)] if others else [])
    figure = new_figure(sum(heights), title)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (along, own) in zip(axes, curves, strict=False):
        curve(axis, along, own)
    if others:
        bars(axes[-1], others, label)
    return figure


def most_of(found: Sequence[Point], along: str, other: str) -> list[Point]:
    """The points of the other value for which most values along the axis were measured; none where that is one."""
    values: dict[int, set[int]] = {}
    for point in found:
        values.setdefault(point.row.shape[other], set()).add(point.row.shape[along])
    best = max(values, key=lambda value: len(values[value]))
    return [point for point in found if point.row.shape[other] == best] if len(values[best]) > 1 else []


def curve(axis: Any, along: str, found: Sequence[Point]) -> None:
    values = sorted({point.row.shape[along] for point in found})
    for number, name in enumerate(dict.fromkeys(point.row.contender for point in found)):
        own = sorted((one for one in found if one.row.contender == name), key=lambda one: one.row.shape[along])
        x, y = [values.index(one.row.shape[along]) for one in own], [one.value for one in own]
        spread = [[one.value - one.low for one in own], [one.high - one.value for one in own]]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        axis.errorbar(x, y, yerr=spread, label=name, linewidth=1.3, **style)
        axis.plot(x, [one.fewer or float("nan") for one in own], color=style["color"], linewidth=1, linestyle=":")
    fixed = f"batch {found[0].row.shape['batch']}" if along == "size" else f"{found[0].row.shape['size']} px"
    axis.set_title(f"{found[0].series}, {fixed} (dotted: fewer FLOPs)", fontsize=9, color=INK, loc="left")
    axis.set_xticks(range(len(values)), [str(value) for value in values])
    axis.set_xlabel("side of the images, px" if along == "size" else "images per call")
    axis.set_ylabel("speed-up")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axis)


def bars_figure(found: Sequence[Point], title: str, label: str) -> Any:
    figure = new_figure(height_of(found), title)
    bars(figure.subplots(), found, label)
    return figure


def height_of(found: Sequence[Point]) -> float:
    return 0.3 * (len(found) + 1.3 * len({point.title for point in found})) + 0.9


def bars(axis: Any, found: Sequence[Point], label: str) -> None:
    """One bar a contender, ours in blue, under the name of its comparison."""
    place, ticks, longest = 0.0, list[tuple[float, str]](), max(point.high for point in found)
    for title, same in groupby(found, key=lambda point: point.title):
        axis.text(0, place, title, fontsize=9, color=INK, fontweight="bold", va="center")
        place += 1.0
        for point in same:
            axis.barh(place, point.value, height=0.75, color=COLOURS[0 if point.row.ours else 6])
            axis.plot([point.low, point.high], [place, place], color=INK, linewidth=1.2)
            if point.fewer is None:
                axis.text(point.high + longest / 80, place, f"{point.value:.3g}", color=INK, fontsize=8.5, va="center")
            else:
                axis.plot([point.fewer] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=2.2)
                axis.text(longest / 80, place, f"{point.value:.2f}x", color="white", fontsize=8.5, va="center")
            ticks.append((place, point.row.contender))
            place += 1.0
        place += 0.3
    axis.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axis.set_ylim(place - 0.3, -0.6)
    axis.set_xlabel(label)
    tidy(axis)


def tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=8.5)
    axis.xaxis.label.set_size(8.5)
    if "speed-up" in axis.get_xlabel() + axis.get_ylabel():
        (axis.axhline if axis.get_ylabel() else axis.axvline)(1.0, color=FAINT, linewidth=1, zorder=0)


def new_figure(height: float, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height + 0.3), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return figure
