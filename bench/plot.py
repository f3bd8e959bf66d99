"""speedup.png of one machine's results: whole models over their baseline. What was not measured is not drawn."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from .ratios import baseline_of, comparisons, flop_reduction, ratio, speedup
from .result import Row, Run

BLUE, GREY = "#0072b2", "#8a93a0"


def draw(runs: Mapping[str, Run], folder: Path) -> None:
    """One bar a contender, under the name of its comparison; without matplotlib a word on stderr."""
    pairs = [(row, base) for row, base in pairs_of(runs) if speedup(row, base) and row is not base]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    if not pairs:
        return
    figure = Figure(
        figsize=(9.0, 0.3 * len(pairs) + 0.4 * len({title(row) for row, _ in pairs}) + 1.2), layout="constrained"
    )
    axis, place, names = figure.subplots(), 0.0, dict[float, str]()
    for comparison, same in groupby(pairs, key=lambda pair: title(pair[0])):
        axis.text(0, place, comparison, fontsize=9, fontweight="bold", va="center")
        for row, base in same:
            place += 1.0
            names[place] = row.contender
            (value, low, high), fewer = ratio(base, row), flop_reduction(row, base)
            axis.barh(place, value, height=0.75, color=BLUE if row.ours else GREY)
            axis.plot([low, high], [place, place], color="black", linewidth=1.2)
            axis.plot([fewer or value] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2.2)
            axis.text(high, place, f"  {value:.3g}", fontsize=8.5, va="center")
        place += 1.3
    axis.set_yticks(list(names), list(names.values()), fontsize=8.5)
    axis.set_ylim(place, -0.7)
    machine = next(iter(runs.values())).environment["device"]
    axis.set_xlabel(
        f"speed-up, {machine}; thick line: fewer FLOPs, thin line: p20 to p80; blue: step_kernels", fontsize=8.5
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "speedup.png", dpi=140, metadata={"Software": None})  # the same results, the same file


def pairs_of(runs: Mapping[str, Run]) -> list[tuple[Row, Row]]:
    """Contenders of whole models and their baselines."""
    rows = (row for run in runs.values() for row in run.rows if "vit" in row.shape)
    return [(row, base) for same in comparisons(rows) if (base := baseline_of(same)) for row in same]


def title(row: Row) -> str:
    return ", ".join([row.case, *(f"{key} {value}" for key, value in row.shape.items())])
