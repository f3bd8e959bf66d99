"""What the plots share: colours, sizes, axes without frills."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from .results import Evidence

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a93a0", "#3b4252")
INK, FAINT = "#1f2430", "#b8bec8"
DOTS_PER_INCH, WIDTH = 140, 9.0


def machine(evidence: Evidence) -> str:
    """What the results were measured on, for a title."""
    environment = evidence.environment
    return str(environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores")


def wrapped(text: str, width: int = 46) -> str:
    """In lines of `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


def patch(colour: str, label: str) -> Any:
    """An entry of a legend: an area."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=label)


def line(colour: str, label: str, *, marker: str = "", dashed: bool = False) -> Any:
    """An entry of a legend: a line."""
    from matplotlib.lines import Line2D

    style: Any = "--" if dashed else "-"
    return Line2D([], [], color=colour, marker=marker, linestyle=style, markersize=4.5, linewidth=1.2, label=label)


def new_figure(height: float, **options: Any) -> Any:
    """An empty figure, as high as that in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def tidied(axes: Sequence[Any]) -> None:
    """Axes without a frame, with small letters."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8.5)
        axis.xaxis.label.set_size(8.5)
        axis.yaxis.label.set_size(8.5)


def titled(figure: Any, title: str) -> Any:
    """The figure with its title."""
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def finished(figure: Any, axes: Sequence[Any], title: str, bottom: float = 0.0) -> Any:
    """A figure of few axes; `bottom` inches are left free for what is below them."""
    tidied(axes)
    titled(figure, title).tight_layout(rect=(0, bottom / figure.get_figheight(), 1, 1))
    return figure
