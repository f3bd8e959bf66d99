"""PNG plots of one machine's results; what was not measured is never drawn, and a plot without any figure is not made.

Each plot is one function of `PLOTS`: results -> a matplotlib figure, or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import need_extra
from ..kernels.contenders import FORWARD
from ..model.bars import Bar
from ..model.layouts import SPREAD
from ..model.profile import OTHER, PARTS
from ..model.schema import ModelRow
from ..report import _number
from ..schema import PASSED, Row
from . import paper
from .bars import all_bars, length_of
from .results import Evidence
from .text import not_measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a93a0", "#3b4252")
PART_COLOURS = dict(zip((part for part, _ in PARTS), COLOURS, strict=True)) | {OTHER: "#d7dbe2"}
INK, FAINT = "#1f2430", "#b8bec8"
DOTS_PER_INCH, WIDTH = 140, 9.0


@dataclass(frozen=True)
class Run:
    """One contender of one comparison, from the main job or from `bench model`."""

    contender: str
    where: str
    speedup: float
    flop_reduction: float
    p20: float
    p80: float


def runs(evidence: Evidence) -> list[Run]:
    """Everybody with a speed-up over dense but dense itself, sorted by model, resolution, batch."""
    found: list[tuple[tuple[str, int, int], Run]] = []
    rows: list[Row | ModelRow] = [] if evidence.main is None else [*evidence.main.rows]
    rows += [] if evidence.model is None else [row for row in evidence.model.rows if row.layout == SPREAD]
    medians = {_case(row): row.median_ms for row in rows if _name(row) == "dense" and row.gate == PASSED}
    for row in rows:
        dense = medians.get(_case(row))
        if _name(row).startswith("dense") or row.speedup is None or row.flop_reduction is None or dense is None:
            continue
        if row.p20_ms is None or row.p80_ms is None:
            continue
        where = f"ViT-{row.model[0].upper()}, {row.size} px, batch {row.batch}"
        run = Run(_name(row), where, row.speedup, row.flop_reduction, dense / row.p80_ms, dense / row.p20_ms)
        found.append(((row.model, row.size, row.batch), run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def speedup(evidence: Evidence) -> Figure | None:
    """Speed-up over dense by resolution and batch, with what the FLOPs would allow, and the share of it that is realised."""
    found = runs(evidence)
    if not found:
        return None
    figure = _figure(0.5 * len(found) + 0.3 * len({run.where for run in found}) + 1.5)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    place, ticks, before = 0.0, [], None
    names = list(dict.fromkeys(run.contender for run in found))
    for run in found:
        if run.where != before:
            place += 0.6
            left.text(
                0.02, place - 0.15, run.where, transform=left.get_yaxis_transform(), color=INK, fontsize=9, va="bottom"
            )
            place += 0.45
            before = run.where
        colour = COLOURS[names.index(run.contender) % len(COLOURS)]
        left.barh(place, run.speedup, height=0.7, color=colour)
        left.plot([run.p20, run.p80], [place, place], color=INK, linewidth=1.2)
        left.plot([run.flop_reduction] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=2.2)
        left.text(0.05, place, f"{run.speedup:.2f}x", color="white", fontsize=8.5, va="center", fontweight="bold")
        realised = run.speedup / run.flop_reduction
        right.barh(place, realised, height=0.7, color=colour)
        right.text(0.02, place, f"{realised:.2f}", color="white", fontsize=8.5, va="center", fontweight="bold")
        ticks.append((place, run.contender))
        place += 1.0
    left.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks])
    left.set_ylim(place - 0.4, 0.1)
    left.axvline(1.0, color=FAINT, linewidth=1)
    right.axvline(1.0, color=FAINT, linewidth=1)
    left.set_xlabel("speed-up over dense (thick line: fewer FLOPs; thin: p20 to p80)")
    right.set_xlabel("realised: speed-up / fewer FLOPs")
    return _finished(figure, (left, right), f"Speed-up, {_machine(evidence)}")


def time(evidence: Evidence) -> Figure | None:
    """Where the time goes: profiled calls by part."""
    profiles: dict[str, Mapping[str, float]] = {}
    if evidence.main is not None and evidence.main.profile:
        row = evidence.main.rows[0]
        where = f"ViT-{row.model[0].upper()}, {row.size} px, batch {row.batch}"
        profiles |= {f"{name}\n{where}": parts for name, parts in evidence.main.profile.items()}
    for result in (evidence.model, evidence.profiled):
        if result is not None:
            profiles |= {name.replace(", ViT", "\nViT", 1): parts for name, parts in result.profile.items()}
    if not profiles:
        return None
    figure = _figure(0.62 * len(profiles) + 1.9)
    axis = figure.subplots()
    parts = [part for part in PART_COLOURS if any(part in profile for profile in profiles.values())]
    for place, profile in enumerate(profiles.values()):
        start, total = 0.0, sum(profile.values())
        for part in parts:
            share = profile.get(part, 0.0) / total
            axis.barh(
                place,
                share,
                left=start,
                height=0.72,
                color=PART_COLOURS[part],
            )
            if share > 0.06:
                axis.text(
                    start + share / 2,
                    place,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    color=INK if part == OTHER else "white",
                    fontsize=8,
                )
            start += share
        axis.text(1.01, place, f"{_number(total)} ms", va="center", fontsize=8.5, color=INK)
    axis.set_yticks(range(len(profiles)), list(profiles), fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of one profiled call")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles = [_patch(PART_COLOURS[part], part) for part in parts]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK)
    return _finished(figure, (axis,), f"Where the time goes, {_machine(evidence)}", bottom=0.75)


def attention(evidence: Evidence) -> Figure | None:
    """TFLOP/s of attention forward against the length, beside published lines; only where a GPU was measured."""
    points: dict[str, dict[int, float]] = {}
    for row in evidence.kernels.rows if evidence.kernels is not None else ():
        length = length_of(row)
        if row.device != "cuda" or row.op != "ragged_attention_equal" or row.direction != FORWARD or length is None:
            continue
        if row.gate == PASSED and row.teraflops_per_second is not None:
            points.setdefault(row.contender, {})[length] = row.teraflops_per_second
    if not points:
        return None
    figure = _figure(5.0)
    axis = figure.subplots()
    for number, (name, values) in enumerate(points.items()):
        axis.plot(
            *zip(*sorted(values.items()), strict=True), marker="o", color=COLOURS[number % len(COLOURS)], label=name
        )
    for style, (name, rates) in zip(("--", "-.", ":", (0, (5, 1))), paper.ANCHORS.items(), strict=True):
        label = f"{name} ({paper.ANCHOR_TAG})"
        axis.plot(paper.ANCHOR_LENGTHS, rates, linestyle=style, color=INK, linewidth=1, alpha=0.7, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens of each image")
    axis.set_ylabel("TFLOP/s, forward")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False, ncols=2)
    return _finished(figure, (axis,), f"Attention at equal lengths, {_machine(evidence)}")


def bars(evidence: Evidence) -> Figure | None:
    """Every bar that was measured: how far above its bar it is."""
    every = all_bars(evidence)
    found = [bar for bar in every if bar.value]
    if not found:
        return None
    figure = _figure(0.55 * len(found) + 1.9)
    axis = figure.subplots()
    for place, bar in enumerate(found):
        met = bar.state == "met"
        axis.barh(place, _over(bar, bar.value or 0.0), height=0.6, color=COLOURS[2] if met else COLOURS[5])
        aim = _over(bar, bar.aim)
        axis.plot([aim] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=1.6)
        axis.text(
            0.02, place, f"{bar.value:.3g}, {bar.state}", va="center", fontsize=8.5, color="white", fontweight="bold"
        )
    axis.axvline(1.0, color=INK, linewidth=1, linestyle="--")
    axis.set_yticks(range(len(found)), [_wrapped(f"{bar.number}: {bar.what}") for bar in found], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("measured / bar, turned round where less is better (dashed: the bar; line: the aim)")
    missing = not_measured(every)
    if missing:
        figure.text(0.01, 0.02, _wrapped(f"Not measured: {missing}", 130), fontsize=8, color=INK)
    return _finished(figure, (axis,), f"Bars, {_machine(evidence)}", bottom=0.4)


PLOTS: dict[str, Callable[[Evidence], Any]] = {
    "speedup.png": speedup,
    "time.png": time,
    "attention.png": attention,
    "bars.png": bars,
}


def write(evidence: Evidence, folder: Path) -> list[Path]:
    """Draws what there is and removes plots of what is there no more.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise need_extra("matplotlib", "plots") from None
    written = []
    for name, draw in PLOTS.items():
        figure = draw(evidence)
        path = folder / name
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        # Without the software's version in it, the same results give the same file on the same machine.
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
        written.append(path)
    return written


def _case(row: Any) -> tuple[str, int, int, str]:
    return row.model, row.size, row.batch, type(row).__name__


def _name(row: Any) -> str:
    return row.contender if isinstance(row, ModelRow) else row.provider


def _over(bar: Bar, value: float) -> float:
    return bar.bar / value if bar.at_most else value / bar.bar


def _machine(evidence: Evidence) -> str:
    environment = evidence.environment
    return str(environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores")


def _wrapped(text: str, width: int = 46) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=label)


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _finished(figure: Any, axes: Sequence[Any], title: str, bottom: float = 0.0) -> Any:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8.5)
        axis.xaxis.label.set_size(8.5)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    figure.tight_layout(rect=(0, bottom / figure.get_figheight(), 1, 1))
    return figure
