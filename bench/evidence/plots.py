"""PNG plots of one machine's results; what was not measured is never drawn, and a plot without any figure is not made.

Each plot is one function of `PLOTS`: results -> a matplotlib figure, or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import need_extra
from ..kernels.contenders import FORWARD
from ..model.bars import Bar
from ..model.profile import OTHER, PARTS
from ..report import _number
from ..schema import PASSED
from . import paper
from .bars import all_bars, length_of
from .drawing import COLOURS, DOTS_PER_INCH, INK, finished, machine, new_figure, patch, wrapped
from .results import Evidence
from .speedup import speedup
from .text import not_measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PART_COLOURS = dict(zip((part for part, _ in PARTS), COLOURS, strict=True)) | {OTHER: "#d7dbe2"}


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
    figure = new_figure(0.62 * len(profiles) + 1.9)
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
    handles = [patch(PART_COLOURS[part], part) for part in parts]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK)
    return finished(figure, (axis,), f"Where the time goes, {machine(evidence)}", bottom=0.75)


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
    figure = new_figure(5.0)
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
    return finished(figure, (axis,), f"Attention at equal lengths, {machine(evidence)}")


def bars(evidence: Evidence) -> Figure | None:
    """Every bar that was measured: how far above its bar it is."""
    every = all_bars(evidence)
    found = [bar for bar in every if bar.value]
    if not found:
        return None
    figure = new_figure(0.55 * len(found) + 1.9)
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
    axis.set_yticks(range(len(found)), [wrapped(f"{bar.number}: {bar.what}") for bar in found], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("measured / bar, turned round where less is better (dashed: the bar; line: the aim)")
    missing = not_measured(every)
    if missing:
        figure.text(0.01, 0.02, wrapped(f"Not measured: {missing}", 130), fontsize=8, color=INK)
    return finished(figure, (axis,), f"Bars, {machine(evidence)}", bottom=0.4)


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


def _over(bar: Bar, value: float) -> float:
    return bar.bar / value if bar.at_most else value / bar.bar
