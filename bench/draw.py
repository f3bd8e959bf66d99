"""The picture: each photograph with its supertokens drawn on it, coloured by side, tokens that halt early tinted."""

from __future__ import annotations

import math
from pathlib import Path

from step_kernels.model import Trace

from .images import Pictures

GREY, INK = "#8a93a0", "#1f2430"
# Okabe and Ito's colours, told apart with any kind of colour vision; white for patches that stayed single.
COLOURS = {1: "#ffffff", 2: "#f0e442", 4: "#e69f00", 8: "#56b4e9", 16: "#cc79a7", 32: "#009e73", 64: "#d55e00"}
HALTED = "#51679b"  # a middle tone, so that it shows on black sky and on white tissue alike


def draw_supertokens(path: Path, pictures: Pictures, trace: Trace) -> None:
    """Writes a PNG of the pictures and the decisions on them; ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    count, grid = len(pictures.names), trace.layout.grid[1]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.3 * columns, 4.6 * rows + 0.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    survives, used = trace.final_layout.sides().cpu() > 0, set[int]()
    for image, (axis, name, pixels) in enumerate(zip(axes, pictures.names, pictures.pixels, strict=False)):
        axis.imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, grid, grid, 0), interpolation="lanczos")
        own = [cell for cell in trace.layout.image(image).cells[:, 1:].tolist() if cell[2]]
        gone = [(row, col, side) for row, col, side in own if not survives[image, row, col]]
        tinted = [Rectangle((col, row), side, side) for row, col, side in gone]
        axis.add_collection(PatchCollection(tinted, facecolor=HALTED, alpha=0.66, edgecolor="none"))
        for side in sorted({side for _, _, side in own}):
            gap = 0.0 if side == 1 else 0.09  # lets the eye see blocks instead of a grid
            squares = [Rectangle((c + gap, r + gap), s - 2 * gap, s - 2 * gap) for r, c, s in own if s == side]
            width, alpha = (0.35, 0.5) if side == 1 else (1.2, 1.0)
            # The dark line under the coloured one keeps it visible on a ground of its own colour.
            for colour, line, strength in ((INK, width + 0.7, 0.35 * alpha), (COLOURS[side], width, alpha)):
                lines = PatchCollection(squares, facecolor="none", edgecolor=colour, linewidth=line, alpha=strength)
                axis.add_collection(lines)
            used.add(side)
        share = f"{len(own)} of {grid * grid} tokens ({len(own) / grid**2:.0%}), {len(gone)} halt early"
        axis.set_title(f"{name.replace('_', ' ')}: {share}", fontsize=9.5, color=INK)
    for axis in figure.axes:
        axis.set_axis_off()
    entries = [Patch(facecolor=GREY, edgecolor=COLOURS[side], label=f"{side}x{side}") for side in sorted(used)]
    entries.append(Patch(facecolor=HALTED, label="halts early"))
    figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=140)
