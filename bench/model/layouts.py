"""Recorded decisions by kind: which cells are merged, and who halts at the exit.

"fixed": every image keeps 1 / 2.5 of its tokens. "spread": the mean image does, and images differ (CV 0.3); see
`bench.kernels.layouts`. In both, 40 % of all tokens halt, drawn at random. The others are adversarial, on spread layouts:
nobody halts, everybody halts, and everybody of one image halts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import Stage, Trace

from ..kernels.layouts import VARIATION, draw_layouts

FIXED, SPREAD = "fixed", "spread"
NONE_HALTED, ALL_HALTED, EMPTY_IMAGE = "none-halted", "all-halted", "empty-image"
KINDS = (SPREAD, FIXED, NONE_HALTED, ALL_HALTED, EMPTY_IMAGE)  # the most important one first
HALT_SHARE = 0.4
NUM_PREFIX = 1  # the class token


def draw_traces(
    kind: str, count: int, batch: int, grid: tuple[int, int], *, block: int, seed: int, device: torch.device
) -> tuple[Trace, ...]:
    """`count` batches of decisions with one exit after `block`, trimmed, on `device`."""
    drawn = draw_layouts(
        count,
        batch,
        grid,
        num_prefix=NUM_PREFIX,
        dtype=torch.float32,
        seed=seed,
        device=torch.device("cpu"),
        variation=0.0 if kind == FIXED else VARIATION,
    )
    generator = torch.Generator().manual_seed(seed)
    traces = []
    for one in drawn:
        halted = _halted(kind, one.layout, generator)
        survivors = survivors_of(one.layout, halted)
        traces.append(Trace(one.layout.to(device), (Stage(block, halted.to(device), survivors.to(device)),)))
    return tuple(traces)


def survivors_of(layout: SupertokenLayout, halted: Tensor) -> SupertokenLayout:
    """The trimmed layout of the tokens of a trimmed layout that do not halt."""
    left = ~halted
    before = torch.cat([left.new_zeros(1, dtype=torch.int32), left.cumsum(0, dtype=torch.int32)])
    cu_seqlens = before[layout.cu_seqlens.long()]
    return SupertokenLayout(cu_seqlens, layout.cells[left], layout.grid, layout.num_prefix, trimmed=True)


def without_exits(trace: Trace) -> Trace:
    """The same merging, nobody halts early."""
    return Trace(trace.layout)


def image_of(trace: Trace, image: int) -> Trace:
    """The decisions on one image of a trimmed trace, as those of a batch of one."""
    layout, stages = trace.layout, []
    for stage in trace.stages:
        rows = rows_of(layout, image)
        stages.append(Stage(stage.block, stage.halted[rows], _layout_of_image(stage.layout, image)))
        layout = stage.layout
    return Trace(_layout_of_image(trace.layout, image), tuple(stages))


def rows_of(layout: SupertokenLayout, image: int) -> slice:
    """The packed rows of one image. Reads the device."""
    start, end = layout.cu_seqlens[image : image + 2].tolist()
    return slice(start, end)


def _layout_of_image(layout: SupertokenLayout, image: int) -> SupertokenLayout:
    cells = layout.cells[rows_of(layout, image)].clone()
    cells[:, 0] = 0
    cu_seqlens = layout.cu_seqlens.new_tensor([0, cells.shape[0]])
    return SupertokenLayout(cu_seqlens, cells, layout.grid, layout.num_prefix, trimmed=True)


def _halted(kind: str, layout: SupertokenLayout, generator: torch.Generator) -> Tensor:
    """bool [tokens] of a trimmed layout on the CPU."""
    is_block = layout.cells[:, 3] > 0
    if kind == NONE_HALTED:
        return torch.zeros_like(is_block)
    if kind == ALL_HALTED:
        return is_block
    halted = torch.zeros_like(is_block)
    blocks = is_block.nonzero().flatten()
    order = torch.rand(blocks.shape[0], generator=generator).argsort()
    halted[blocks[order[: round(HALT_SHARE * blocks.shape[0])]]] = True
    if kind == EMPTY_IMAGE:
        halted |= is_block & (layout.cells[:, 0] == layout.batch_size // 2)
    return halted
