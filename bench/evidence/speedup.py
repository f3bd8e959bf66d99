"""The plot of speed-ups over dense, against resolution and batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.bars import is_compiled
from ..model.layouts import SPREAD
from ..model.schema import ModelRow
from ..schema import PASSED, Row
from .drawing import COLOURS, FAINT, INK, line, machine, new_figure, tidied, titled
from .results import Evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vPX"  # one fewer than colours, so that no pair of them comes twice


@dataclass(frozen=True)
class Run:
    """One contender of one comparison, from the main job or from `bench model`."""

    contender: str
    family: str
    source: str
    model: str
    size: int
    batch: int
    speedup: float
    flop_reduction: float
    p20: float
    p80: float

    @property
    def where(self) -> str:
        """Which comparison."""
        return f"ViT-{self.model[0].upper()}, {self.size} px, batch {self.batch}"

    @property
    def realised(self) -> float:
        """Speed-up / fewer FLOPs."""
        return self.speedup / self.flop_reduction


def runs(evidence: Evidence) -> list[Run]:
    """Everybody with a speed-up over dense but dense itself, sorted by model, resolution, batch; on a GPU, only where dense was compiled."""
    found: list[Run] = []
    rows: list[Row | ModelRow] = [] if evidence.main is None else [*evidence.main.rows]
    rows += [] if evidence.model is None else [row for row in evidence.model.rows if row.layout == SPREAD]
    medians = {
        _case(row): row.median_ms for row in rows if _name(row) == "dense" and row.gate == PASSED and _counts(row)
    }
    for row in rows:
        dense = medians.get(_case(row))
        if _name(row).startswith("dense") or row.speedup is None or row.flop_reduction is None or dense is None:
            continue
        if row.p20_ms is None or row.p80_ms is None:
            continue
        family = row.family if isinstance(row, ModelRow) else row.provider
        where = family, type(row).__name__, row.model, row.size, row.batch
        found.append(Run(_name(row), *where, row.speedup, row.flop_reduction, dense / row.p80_ms, dense / row.p20_ms))
    return sorted(found, key=lambda run: (run.model, run.size, run.batch))


def _counts(dense: Row | ModelRow) -> bool:
    """Whether a dense row is what users of its device run."""
    return not isinstance(dense, ModelRow) or dense.device == "cpu" or is_compiled(dense)


@dataclass(frozen=True)
class Series:
    """What is drawn over one axis: the runs of a model that differ in one thing alone.

    Attributes:
        along: "size" or "batch".
        title: what they have in common.
        runs: those that are drawn.
    """

    along: str
    title: str
    runs: tuple[Run, ...]

    @property
    def values(self) -> list[int]:
        """Along the axis."""
        return sorted({getattr(run, self.along) for run in self.runs})


def series_of(found: Sequence[Run]) -> list[Series]:
    """Each model of each source against the resolution and against the batch, where there are several of them."""
    made = []
    for source, model in dict.fromkeys((run.source, run.model) for run in found):
        own = [run for run in found if (run.source, run.model) == (source, model)]
        for along, other in (("size", "batch"), ("batch", "size")):
            common = _with_most_of(own, along, other)
            same = tuple(run for run in own if getattr(run, other) == common)
            title = f"ViT-{model[0].upper()}, " + (f"batch {common}" if other == "batch" else f"{common} px")
            series = Series(along, title, same)
            if len(series.values) > 1:
                made.append(series)
    return made


def speedup(evidence: Evidence) -> Figure | None:
    """Speed-up over dense and its realised share: curves where several resolutions or batch sizes were measured, bars elsewhere."""
    found = runs(evidence)
    if not found:
        return None
    curves = series_of(found)
    drawn = {run for series in curves for run in series.runs}
    others = [run for run in found if run not in drawn]
    names = list(dict.fromkeys(run.contender for run in found))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    rows = math.ceil(len(curves) / 2)
    in_curves = [name for name in names if any(run.contender == name for run in drawn)]
    heights = [4.6] * rows + ([0.22 * math.ceil((len(in_curves) + 1) / 2) + 0.15] if curves else [])
    heights += [0.5 * len(others) + 0.3 * len({run.where for run in others}) + 0.9] if others else []
    figure = new_figure(sum(heights) + 0.4, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row in range(rows):
        upper, lower = parts[row].subplots(2, 2, height_ratios=(3, 2))
        for column, series in enumerate(curves[2 * row : 2 * row + 2]):
            _curves(upper[column], lower[column], series, colours)
        for axis in (*upper, *lower):
            axis.set_visible(axis.has_data())
        tidied([*upper, *lower])
    if curves:
        handles = [line(colours[name], name, marker=_marker(colours, name)) for name in in_curves]
        handles.append(line(INK, "fewer FLOPs", dashed=True))
        parts[rows].legend(handles=handles, loc="center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    if others:
        left, right = parts[-1].subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _bars(left, right, others, colours)
        tidied([left, right])
    return titled(figure, f"Speed-up over dense, {machine(evidence)}")


def _curves(upper: Any, lower: Any, series: Series, colours: Mapping[str, str]) -> None:
    """Above the speed-up of each contender with its p20 to p80 and what the FLOPs would allow, below the realised share."""
    # Side by side instead of one above the other, and evenly, whatever the values.
    places = {value: place for place, value in enumerate(series.values)}
    contenders = list(dict.fromkeys(run.contender for run in series.runs))
    for number, name in enumerate(contenders):
        own = [run for run in series.runs if run.contender == name]
        shift = 0.24 * ((number + 0.5) / len(contenders) - 0.5)
        x = [places[getattr(run, series.along)] + shift for run in own]
        style = {"color": colours[name], "marker": _marker(colours, name), "markersize": 4.5, "linewidth": 1.2}
        y = [run.speedup for run in own]
        spread = [[run.speedup - run.p20 for run in own], [run.p80 - run.speedup for run in own]]
        upper.errorbar(x, y, yerr=spread, elinewidth=1.0, label=name, **style)
        lower.plot(x, [run.realised for run in own], **style)
    for family in dict.fromkeys(run.family for run in series.runs):
        allowed = {getattr(run, series.along): run.flop_reduction for run in series.runs if run.family == family}
        line = sorted(allowed.items())
        upper.plot(
            [places[value] for value, _ in line], [times for _, times in line], color=INK, linewidth=1, linestyle="--"
        )
        upper.annotate(
            family,
            (places[line[-1][0]], line[-1][1]),
            (0, 3),
            textcoords="offset points",
            fontsize=7.5,
            color=INK,
            ha="right",
        )
    upper.set_title(
        f"{series.title}: against the {'resolution' if series.along == 'size' else series.along}",
        fontsize=9,
        color=INK,
        loc="left",
    )
    unit = " px" if series.along == "size" else ""
    for axis in (upper, lower):
        axis.set_xticks(range(len(places)), [f"{value}{unit}" for value in places])
        axis.set_xlim(-0.4, len(places) - 0.6)
        axis.set_ylim(bottom=0)
        axis.axhline(1.0, color=FAINT, linewidth=1, zorder=0)
    upper.set_ylabel("speed-up")
    lower.set_ylabel("realised")
    lower.set_xlabel("side of the images" if series.along == "size" else "images per call")


def _bars(left: Any, right: Any, found: Sequence[Run], colours: Mapping[str, str]) -> None:
    """One bar a contender, under the name of its comparison."""
    place, ticks, before = 0.0, [], None
    for run in found:
        if run.where != before:
            place += 0.6
            left.text(
                0.02, place - 0.15, run.where, transform=left.get_yaxis_transform(), color=INK, fontsize=9, va="bottom"
            )
            place += 0.45
            before = run.where
        left.barh(place, run.speedup, height=0.7, color=colours[run.contender])
        left.plot([run.p20, run.p80], [place, place], color=INK, linewidth=1.2)
        left.plot([run.flop_reduction] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=2.2)
        left.text(0.05, place, f"{run.speedup:.2f}x", color="white", fontsize=8.5, va="center", fontweight="bold")
        right.barh(place, run.realised, height=0.7, color=colours[run.contender])
        right.text(0.02, place, f"{run.realised:.2f}", color="white", fontsize=8.5, va="center", fontweight="bold")
        ticks.append((place, run.contender))
        place += 1.0
    left.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks])
    right.tick_params(labelleft=False)
    left.set_ylim(place - 0.4, 0.1)
    left.axvline(1.0, color=FAINT, linewidth=1)
    right.axvline(1.0, color=FAINT, linewidth=1)
    left.set_xlabel("speed-up over dense (thick line: fewer FLOPs; thin: p20 to p80)")
    right.set_xlabel("realised: speed-up / fewer FLOPs")


def _with_most_of(found: Sequence[Run], along: str, other: str) -> int:
    """The batch size (or size) at which most sizes (or batch sizes) were measured, the first one of equals."""
    measured: dict[int, set[int]] = {}
    for run in found:
        measured.setdefault(getattr(run, other), set()).add(getattr(run, along))
    return max(measured, key=lambda value: len(measured[value]))


def _marker(colours: Mapping[str, str], name: str) -> str:
    """Told apart without colours, too."""
    return MARKERS[[*colours].index(name) % len(MARKERS)]


def _case(row: Any) -> tuple[str, int, int, str]:
    return row.model, row.size, row.batch, type(row).__name__


def _name(row: Any) -> str:
    return row.contender if isinstance(row, ModelRow) else row.provider
