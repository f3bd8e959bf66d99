"""Recorded decisions by kind: which cells are merged, and who halts at the exit.

"fixed": every image keeps 1 / 2.5 of its tokens. "spread": the mean image does, and images differ (CV 0.3); see
`bench.kernels.layouts`. "realistic": those that the variance policy chooses on photographs, the mean image again at 1 / 2.5; see
`bench.model.realistic`. In all three, 40 % of all tokens halt, drawn at random. The others are adversarial, on spread layouts:
nobody halts, everybody halts, and everybody of one image halts. "quota", of `bench peers`: what CTS can take, the same number of 2x2
blocks in every image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import Stage, Trace

from ..kernels.layouts import VARIATION, draw_layouts
from . import realistic

FIXED, SPREAD, REALISTIC = "fixed", "spread", "realistic"
NONE_HALTED, ALL_HALTED, EMPTY_IMAGE = "none-halted", "all-halted", "empty-image"
KINDS = (SPREAD, REALISTIC, FIXED, NONE_HALTED, ALL_HALTED, EMPTY_IMAGE)  # the most important one first
QUOTA = "quota"  # not a default of `bench model`
# Of the 2x2 blocks, in every image: CTS's own quota at 768 px, where 2304 patches become 1296 tokens.
QUOTA_SHARE = 336 / 576
HALT_SHARE = 0.4
NUM_PREFIX = 1  # the class token


def draw_traces(
    kind: str, count: int, batch: int, grid: tuple[int, int], *, block: int, seed: int, device: torch.device
) -> tuple[Trace, ...]:
    """`count` batches of decisions with one exit after `block`, trimmed, on `device`."""
    generator = torch.Generator().manual_seed(seed)
    if kind == QUOTA:
        layouts = [_quota_layout(batch, grid, generator) for _ in range(count)]
    elif kind == REALISTIC:
        layouts = realistic.draw_layouts(count, batch, grid, num_prefix=NUM_PREFIX)
    else:
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
        layouts = [one.layout for one in drawn]
    traces = []
    for layout in layouts:
        halted = _halted(kind, layout, generator)
        survivors = survivors_of(layout, halted)
        traces.append(Trace(layout.to(device), (Stage(block, halted.to(device), survivors.to(device)),)))
    return tuple(traces)


def _quota_layout(batch: int, grid: tuple[int, int], generator: torch.Generator) -> SupertokenLayout:
    """Blocks at random places."""
    rows, cols = grid[0] // 2, grid[1] // 2
    order = torch.rand(batch, rows * cols, generator=generator).argsort(1)
    shared = (order < round(QUOTA_SHARE * rows * cols)).view(batch, rows, cols)
    sides = torch.ones(batch, *grid, dtype=torch.int32)
    sides[:, : 2 * rows, : 2 * cols][shared.repeat_interleave(2, 1).repeat_interleave(2, 2)] = 2
    return SupertokenLayout.from_sides(sides, num_prefix=NUM_PREFIX).trim()


def survivors_of(layout: SupertokenLayout, halted: Tensor) -> SupertokenLayout:
    """The trimmed layout of the tokens of a trimmed layout that do not halt."""
    left = ~halted
    before = torch.cat([left.new_zeros(1, dtype=torch.int32), left.cumsum(0, dtype=torch.int32)])
    cu_seqlens = before[layout.cu_seqlens.long()]
    return SupertokenLayout(cu_seqlens, layout.cells[left], layout.grid, layout.num_prefix, trimmed=True)


def without_exits(trace: Trace) -> Trace:
    """The same merging, nobody halts early."""
    return Trace(trace.layout)


def without_merging(trace: Trace) -> Trace:
    """The decisions on every patch for itself: it halts where the token that covers it halts."""
    grid, device = trace.layout.grid, trace.layout.device
    layout = SupertokenLayout.uniform(trace.layout.batch_size, grid, num_prefix=NUM_PREFIX, device=device)
    before, stages = layout, []
    for stage in trace.stages:
        image, row, col, side = before.cells.long().unbind(1)
        halted = gone_at(trace, stage)[image, row, col] & (side > 0)
        before = survivors_of(before, halted)
        stages.append(Stage(stage.block, halted, before))
    return Trace(layout, tuple(stages))


def gone_at(trace: Trace, stage: Stage) -> Tensor:
    """bool [B, rows, cols]: cells whose token halts at this exit."""
    return (trace.layout_of(stage.block).sides() > 0) & (stage.layout.sides() == 0)


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
