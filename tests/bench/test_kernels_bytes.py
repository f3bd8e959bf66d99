"""Necessary bytes and layouts, added up by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import CPU, on_a_gpu, small_source

from bench.kernels import ops_canvas, ops_exits, ops_merging
from bench.kernels.contenders import FORWARD
from bench.kernels.layouts import REDUCTION, VARIATION, draw_layouts
from bench.kernels.measure import directions
from bench.kernels.operation import LARGE_ENOUGH, Operation, block_rows, covered_cells
from bench.kernels.rows import blank_row
from step_kernels import resolve_layout

ROWS, BLOCKS, CELLS = 14, 13, 16
LAYOUT = 2 * 4 + ROWS * 16  # cu_seqlens and cells
IMAGES, PATCH_ROW = 3 * 8 * 8 * 4, 3 * 2 * 2 * 4
TOKEN, SCORES = 8 * 4, 3 * 4  # one row of D = 8 and of C = 3 in fp32
EMBEDDING = 8 * PATCH_ROW + TOKEN + CELLS * TOKEN + TOKEN  # weight, bias, positions, prefix
HEAD = 2 * TOKEN + 3 * TOKEN + SCORES  # norm weight and bias, weight, bias
# The first block (4 cells) and a single cell halt: 12 rows survive.
HALTED_CELLS, LEFT = 5, 12
STAGE = 8 + ROWS * (1 + 4 + 4) + LEFT * (16 + 4) + HALTED_CELLS * SCORES + LEFT * TOKEN


@pytest.mark.parametrize(
    ("operation", "forward", "backward"),
    [
        (ops_merging.RESOLVE_LAYOUT, (4 + 1) * 4 + LAYOUT, None),
        (ops_merging.FROM_SIDES, CELLS * 4 + LAYOUT, None),
        (
            ops_merging.MERGE_PATCHES,
            IMAGES + LAYOUT + ROWS * PATCH_ROW,
            BLOCKS * PATCH_ROW + LAYOUT + IMAGES,
        ),
        (
            ops_merging.EMBED_PATCHES,
            IMAGES + EMBEDDING + LAYOUT + ROWS * TOKEN,
            768 + EMBEDDING + LAYOUT + ROWS * TOKEN,
        ),
        (
            ops_merging.MERGE_TOKENS,
            CELLS * TOKEN + TOKEN + LAYOUT + ROWS * TOKEN,
            ROWS * TOKEN + LAYOUT + CELLS * TOKEN + TOKEN,
        ),
        (ops_exits.HALT_TOKENS, ROWS * SCORES + LAYOUT + LEFT * TOKEN + STAGE, None),
        (ops_exits.EXIT_HEAD, ROWS * TOKEN + HEAD + LAYOUT + STAGE, None),
        # 40 % of 13 blocks, rounded: 5 halt, 9 rows survive.
        (ops_exits.GATHER_TOKENS, 9 * 4 + 2 * 9 * TOKEN, 9 * 4 + 9 * TOKEN + ROWS * TOKEN),
        (ops_canvas.CLASSES_BACK, BLOCKS * SCORES + LAYOUT + CELLS * SCORES, CELLS * SCORES + LAYOUT + ROWS * SCORES),
        (ops_canvas.TOKENS_BACK, BLOCKS * TOKEN + LAYOUT + CELLS * TOKEN, CELLS * TOKEN + LAYOUT + ROWS * TOKEN),
        (ops_canvas.SCATTER_INTO, 2 * SCORES + ROWS + LAYOUT + HALTED_CELLS * SCORES, None),
        (ops_canvas.UPSAMPLE_ARGMAX, CELLS * SCORES + 8 * 8, None),
    ],
    ids=lambda value: value.name if isinstance(value, Operation) else "",
)
def test_bytes_of_a_layout_counted_by_hand(operation: Operation, forward: int, backward: int | None) -> None:
    example = operation.make(small_source())
    selected = torch.zeros(ROWS, dtype=torch.bool)
    selected[1:3] = True
    masks = {name: selected for name in ("halted", "where") if name in example.tensors}
    example = dataclasses.replace(example, tensors={**example.tensors, **masks})
    assert operation.necessary_bytes(example) == forward
    assert (operation.backward_bytes and operation.backward_bytes(example)) == backward


def test_bytes_do_not_depend_on_the_batch_mates_tail() -> None:
    """Half the bytes in half the dtype: only the data shrinks, the layout stays int32."""
    source = small_source()
    half = dataclasses.replace(source, shape=dataclasses.replace(source.shape, dtype=torch.bfloat16))
    for operation in (ops_merging.MERGE_TOKENS, ops_canvas.TOKENS_BACK):
        full, narrow = (operation.necessary_bytes(operation.make(one)) for one in (source, half))
        assert full - LAYOUT == 2 * (narrow - LAYOUT)


MOVERS = [operation for operation in (*ops_merging.OPERATIONS, *ops_canvas.OPERATIONS) if operation.gpu_only]


@pytest.mark.parametrize("operation", MOVERS, ids=lambda operation: f"{operation.name}, {operation.batches}")
def test_movers_exceed_the_caches_of_a_gpu(operation: Operation) -> None:
    source = on_a_gpu(operation)
    row = blank_row(operation, FORWARD, [operation.make(source)], source.shape)
    assert LARGE_ENOUGH == 120e6 < row.necessary_bytes < 4 * LARGE_ENOUGH
    assert f", batch {source.shape.batch}" in row.variant
    assert source.shape.batch == operation.batches * 8
    assert directions(operation) == (FORWARD,)


def test_every_mover_has_a_large_variant_and_the_others_are_smaller() -> None:
    assert {mover.name for mover in MOVERS} == {"merge_patches", "merge_tokens", "scatter_back", "scatter_into"}
    smaller = dataclasses.replace(ops_merging.MERGE_TOKENS, batches=1)
    assert smaller.necessary_bytes(smaller.make(on_a_gpu(smaller))) < LARGE_ENOUGH


def test_counts_of_a_layout() -> None:
    layout = small_source().layout
    assert (layout.capacity, block_rows(layout), covered_cells(layout)) == (ROWS, BLOCKS, CELLS)


@pytest.mark.parametrize(("batch", "count"), [(8, 2), (2, 3), (1, 4)])
def test_layouts_are_spread_as_promised(batch: int, count: int) -> None:
    grid = (32, 32)
    drawn = draw_layouts(count, batch, grid, num_prefix=1, dtype=torch.bfloat16, seed=1, device=CPU)
    counts = torch.stack([one.layout.lengths() - 1 for one in drawn]).double()
    groups = counts.T if batch == 1 else counts
    assert torch.allclose(groups.mean(1), torch.tensor(grid[0] * grid[1] / REDUCTION).double(), rtol=0.02)
    assert torch.allclose(groups.std(1, correction=0) / groups.mean(1), torch.tensor(VARIATION).double(), atol=0.02)
    sides = {side for one in drawn for side in one.layout.cells[:, 3].tolist()}
    assert {0, 1, 2, 4, 8} <= sides <= {0, 1, 2, 4, 8, 16}
    for one in drawn:
        one.layout.validate()
        again = resolve_layout(list(one.scores), sides=one.sides, thresholds=0.0, grid=grid, num_prefix=1).trim()
        assert torch.equal(again.cells, one.layout.cells)


def test_layouts_depend_on_the_seed_alone() -> None:
    def cells(seed: int) -> list[list[int]]:
        keywords = {"num_prefix": 1, "dtype": torch.float32, "device": CPU}
        return draw_layouts(1, 2, (16, 16), seed=seed, **keywords)[0].layout.cells.tolist()

    assert cells(5) == cells(5) != cells(6)


def test_smallest_grid_has_a_layout() -> None:
    (drawn,) = draw_layouts(1, 1, (2, 2), num_prefix=1, dtype=torch.float32, seed=0, device=CPU)
    assert drawn.sides == (2,)
    assert drawn.layout.capacity in (2, 5)
