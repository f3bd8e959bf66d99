"""The picture: each photograph with its supertokens drawn on it, coloured by side, tokens that halt early tinted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import need_extra

if TYPE_CHECKING:
    from step_kernels.model import Trace

# Okabe and Ito's colours, told apart with any kind of colour vision; white for patches that stayed single.
COLOURS = {1: "#ffffff", 2: "#f0e442", 4: "#e69f00", 8: "#56b4e9", 16: "#cc79a7", 32: "#009e73", 64: "#d55e00"}
HALTED = "#51679b"  # a middle tone, so that it shows on black sky and on white tissue alike
INK = "#1f2430"
INCHES_PER_PHOTOGRAPH = 4.2
DOTS_PER_INCH = 140


@dataclass(frozen=True)
class Blocks:
    """The supertokens of one image.

    Attributes:
        cells: int [tokens, 3]: row and column of the top-left cell, and side in cells.
        halted: bool [tokens]: leaves at an exit.
    """

    cells: np.ndarray
    halted: np.ndarray


def blocks_of(trace: Trace) -> list[Blocks]:
    """One `Blocks` per image of a recorded run."""
    last = trace.stages[-1].layout if trace.stages else trace.layout
    survives = last.sides().cpu().numpy() > 0
    cells = trace.layout.cells.cpu().numpy()
    cells = cells[cells[:, 3] > 0]
    images = []
    for image in range(trace.layout.batch_size):
        own = cells[cells[:, 0] == image, 1:]
        images.append(Blocks(own, ~survives[image, own[:, 0], own[:, 1]]))
    return images


def draw_supertokens(
    path: Path, pixels: np.ndarray, names: Sequence[str], images: Sequence[Blocks], *, grid: int, exits: Sequence[int]
) -> None:
    """Writes the PNG.

    Args:
        path: the file.
        pixels: uint8 [batch, size, size, 3].
        names: of the photographs.
        images: `blocks_of` the same batch.
        grid: cells along one side.
        exits: block numbers after which tokens halt, for the caption.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise need_extra("matplotlib", "the picture") from None
    columns = math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    side, title, legend, margin = INCHES_PER_PHOTOGRAPH, 0.34, 0.62, 0.06
    width, height = columns * (side + margin) + margin, rows * (side + title) + legend
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, photograph, name, blocks in zip(axes, pixels, names, images, strict=False):
        _draw_photograph(axis, photograph, blocks, grid)
        axis.set_title(_caption(name, blocks, grid, exits), fontsize=9.5, color=INK, pad=5)
    for axis in list(axes):
        axis.remove()
    sides = sorted({int(side) for blocks in images for side in blocks.cells[:, 2]})
    _draw_legend(figure, sides, any(blocks.halted.any() for blocks in images), exits)
    figure.subplots_adjust(
        left=margin / width,
        right=1 - margin / width,
        top=1 - title / height,
        bottom=legend / height,
        wspace=margin / side,
        hspace=title / side,
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_photograph(axis: Any, photograph: np.ndarray, blocks: Blocks, grid: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    size = photograph.shape[0]
    cell = size / grid
    axis.imshow(photograph, extent=(0, size, size, 0), interpolation="lanczos")
    axis.set_axis_off()
    halted = blocks.cells[blocks.halted]
    tinted = [Rectangle((col * cell, row * cell), side * cell, side * cell) for row, col, side in halted]
    axis.add_collection(PatchCollection(tinted, facecolor=HALTED, alpha=0.66, edgecolor="none"))
    for side in sorted(set(blocks.cells[:, 2])):
        corners = blocks.cells[blocks.cells[:, 2] == side]
        # A gap between neighbours lets the eye see blocks instead of a grid.
        gap = 0.0 if side == 1 else 0.09 * cell + 0.5
        squares = [
            Rectangle((col * cell + gap, row * cell + gap), side * cell - 2 * gap, side * cell - 2 * gap)
            for row, col, _ in corners
        ]
        width, alpha = (0.35, 0.5) if side == 1 else (1.2, 1.0)
        # The dark line under the coloured one keeps it visible on a ground of its own colour.
        for colour, line, strength in ((INK, width + 0.7, 0.35 * alpha), (COLOURS[side], width, alpha)):
            axis.add_collection(
                PatchCollection(squares, facecolor="none", edgecolor=colour, linewidth=line, alpha=strength)
            )


def _caption(name: str, blocks: Blocks, grid: int, exits: Sequence[int]) -> str:
    tokens, patches = len(blocks.cells), grid * grid
    text = f"{name.replace('_', ' ')}: {tokens} of {patches} tokens ({tokens / patches:.0%})"
    halted = int(blocks.halted.sum())
    return text + (f", {halted} halt early" if exits else "")


def _draw_legend(figure: Any, sides: Sequence[int], any_halted: bool, exits: Sequence[int]) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(
            facecolor="#8a93a0" if side == 1 else COLOURS[side] + "40",
            edgecolor=COLOURS[side],
            linewidth=0.6 if side == 1 else 1.6,
            label="single patch" if side == 1 else f"{side}x{side} patches in one token",
        )
        for side in sides
    ]
    if any_halted:
        blocks = " and ".join(str(block) for block in exits)
        entries.append(Patch(facecolor=HALTED, alpha=0.8, edgecolor="none", label=f"halts after block {blocks}"))
    columns = min(3, len(entries))
    figure.legend(
        handles=entries,
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.4,
        handleheight=1.2,
    )
