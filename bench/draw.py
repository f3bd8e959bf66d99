"""The picture: each photograph with its supertokens drawn on it, coloured by side, tokens that halt early tinted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from step_kernels.model import Trace

# Okabe and Ito's colours, told apart with any kind of colour vision; white for patches that stayed single.
COLOURS = {1: "#ffffff", 2: "#f0e442", 4: "#e69f00", 8: "#56b4e9", 16: "#cc79a7", 32: "#009e73", 64: "#d55e00"}
HALTED = "#51679b"  # a middle tone, so that it shows on black sky and on white tissue alike
INK = "#1f2430"


def draw_supertokens(path: Path, pixels: np.ndarray, names: Sequence[str], trace: Trace) -> None:
    """Writes a PNG.

    Args:
        path: of the file.
        pixels: uint8 [batch, size, size, 3].
        names: of the pictures.
        trace: the decisions on them.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    columns = math.ceil(math.sqrt(len(names)))
    rows, grid, size = math.ceil(len(names) / columns), trace.layout.grid[1], pixels.shape[1]
    figure = Figure(figsize=(4.3 * columns, 4.6 * rows + 0.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    survives, sides = trace.final_layout.sides().cpu() > 0, trace.layout.sides().cpu()
    cells = trace.layout.cells[trace.layout.cells[:, 3] > 0].cpu()
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for image, (axis, name) in enumerate(zip(axes, names, strict=False)):
        axis.imshow(pixels[image], extent=(0, grid, grid, 0), interpolation="lanczos")
        own = cells[cells[:, 0] == image, 1:].tolist()
        gone = [not survives[image, row, col] for row, col, _ in own]
        tinted = [Rectangle((c, r), s, s) for (r, c, s), halted in zip(own, gone, strict=True) if halted]
        axis.add_collection(PatchCollection(tinted, facecolor=HALTED, alpha=0.66, edgecolor="none"))
        for side in sorted({side for _, _, side in own}):
            gap = 0.0 if side == 1 else 0.09 + 0.5 * grid / size  # lets the eye see blocks instead of a grid
            squares = [Rectangle((c + gap, r + gap), s - 2 * gap, s - 2 * gap) for r, c, s in own if s == side]
            width, alpha = (0.35, 0.5) if side == 1 else (1.2, 1.0)
            # The dark line under the coloured one keeps it visible on a ground of its own colour.
            for colour, line, strength in ((INK, width + 0.7, 0.35 * alpha), (COLOURS[side], width, alpha)):
                lines = PatchCollection(squares, facecolor="none", edgecolor=colour, linewidth=line, alpha=strength)
                axis.add_collection(lines)
        share = f"{len(own)} of {grid * grid} tokens ({len(own) / grid**2:.0%}), {sum(gone)} halt early"
        axis.set_title(f"{name.replace('_', ' ')}: {share}", fontsize=9.5, color=INK)
    for axis in figure.axes:
        axis.set_axis_off()
    labels = {side: "single patch" if side == 1 else f"{side}x{side} patches in one token" for side in COLOURS}
    entries = [Patch(facecolor="#8a93a0", edgecolor=COLOURS[s], label=labels[s]) for s in labels if (sides == s).any()]
    if trace.stages:
        entries.append(Patch(facecolor=HALTED, label=f"halts after block {trace.stages[-1].block}"))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=140)
