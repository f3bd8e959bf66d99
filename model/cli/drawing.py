"""Decisions as pictures: blocks outlined by side, cells tinted by the exit that their token took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import scatter_back
from ...extras import import_extra
from ..trace import Trace

__all__ = ["DEPTHS", "PALETTE", "SIDES", "depth_map", "figure", "overlay", "side_map"]

# Okabe and Ito's colours, told apart with any kind of colour vision; white for patches that stayed single.
SIDES = {1: "#ffffff", 2: "#f0e442", 4: "#e69f00", 8: "#56b4e9", 16: "#cc79a7", 32: "#009e73", 64: "#d55e00"}
# From the first exit to later ones, the last colour for all that follow; light where tokens reach the end.
DEPTHS, END = ("#3b1f5b", "#2f5d8a", "#2a8c82", "#7fb24a", "#c9b52a"), "#f4f1ea"
LINE, FAINT, SIDE, DEPTH = 1, 2, 3, 10  # in the palette; 0 is transparent
PALETTE = np.array(
    [(0, 0, 0, 0), (31, 36, 48, 110), (255, 255, 255, 70)]
    + [(*bytes.fromhex(colour[1:]), 255) for colour in SIDES.values()]
    + [(*bytes.fromhex(colour[1:]), 140) for colour in DEPTHS],
    np.uint8,
)


def overlay(trace: Trace, exits: int, scale: int) -> np.ndarray:
    """Of one image after its first ``exits`` exits: numbers of `PALETTE`, uint8 [rows * scale, cols * scale]."""
    blocks = scatter_back(trace.layout.cells[:, 1:].float(), trace.layout)[0].long()
    row, col, side = blocks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    y, x = torch.meshgrid(*(torch.arange(length, device="cpu") for length in side.shape), indexing="ij")
    y, x, last = y - row * scale, x - col * scale, side * scale - 1
    edge = torch.stack([y, x, last - y, last - x]).amin(0)  # pixels to the block's own
    drawn = torch.zeros_like(side)
    depth = trace.exit_blocks()[0].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    for number, stage in enumerate(trace.stages[:exits]):
        drawn[depth == stage.block] = DEPTH + min(number, len(DEPTHS) - 1)
    single = side == 1
    drawn[single & ((y == 0) | (x == 0))] = FAINT
    drawn[~single & (edge == 0)] = LINE  # keeps the colour visible on a ground of its own
    coloured = ~single & (edge > 0) & (edge <= max(1, scale // 6))
    drawn[coloured] = SIDE + side[coloured].double().log2().long()
    return drawn.to(torch.uint8).numpy()


def side_map(trace: Trace) -> np.ndarray:
    """Colours of one image's blocks: uint8 [rows, cols, 3]."""
    return PALETTE[SIDE + np.log2(trace.layout.sides()[0].clamp(min=1).numpy()).astype(int), :3]


def depth_map(trace: Trace) -> np.ndarray:
    """Colours of the exits that one image's cells took: uint8 [rows, cols, 3]."""
    depth, blocks = trace.exit_blocks()[0].numpy(), [stage.block for stage in trace.stages]
    colours = np.array([tuple(bytes.fromhex(colour[1:])) for colour in (*DEPTHS, END)], np.uint8)
    return colours[[[min(blocks.index(block), len(DEPTHS) - 1) if block else -1 for block in row] for row in depth]]


def figure(trace: Trace, images: Tensor, titles: Sequence[str] | None = None) -> Any:
    """What `Trace.figure` returns."""
    import_extra("matplotlib.pyplot", "matplotlib", "bench")  # in a notebook this lets figures be shown
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    trace, count = trace.trim().to("cpu"), trace.layout.batch_size
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    height = 4.3 * trace.layout.grid[0] / trace.layout.grid[1] + 0.3
    made = Figure(figsize=(4.3 * columns, height * rows + 0.6), facecolor="white", layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False).flat
    used, scale = set[int](), max(6, math.ceil(640 / max(trace.layout.grid)))
    for number, (axis, image) in enumerate(zip(axes, images.detach().cpu(), strict=False)):
        own = trace.image(number)
        told = own.summary()
        drawn = overlay(own, len(own.stages), scale)
        extent = (0, drawn.shape[1], drawn.shape[0], 0)
        axis.imshow(shown(image).permute(1, 2, 0).numpy(), extent=extent, interpolation="lanczos")
        axis.imshow(PALETTE[drawn], extent=extent, interpolation="antialiased")
        used |= told["sides"].keys()
        tokens, halted = told["stages"][0]["tokens"], sum(stage["halted"] for stage in told["stages"])
        name = f"{titles[number].replace('_', ' ')}: " if titles else ""
        share = f"{tokens} of {told['patches']} tokens ({tokens / told['patches']:.0%}), {halted} halt early"
        axis.set_title(name + share, fontsize=9.5)
    for axis in made.axes:
        axis.set_axis_off()
    entries = [Patch(facecolor="#8a93a0", edgecolor=SIDES[side], label=f"{side}x{side}") for side in sorted(used)]
    tints = zip(trace.stages, (*DEPTHS, *DEPTHS[-1:] * len(trace.stages)), strict=False)
    entries += [Patch(facecolor=colour, label=f"halts after block {stage.block}") for stage, colour in tints]
    made.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return made


def shown(image: Tensor) -> Tensor:
    """uint8 as it is; other values stretched to 0..1."""
    if image.dtype == torch.uint8:
        return image
    low, high = image.float().aminmax()
    return (image.float() - low) / (high - low).clamp(min=1e-6)
