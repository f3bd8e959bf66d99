"""Recorded decisions in the peers' form: quota layouts, exits without merging, masks."""

from __future__ import annotations

import pytest
import torch

from bench.model.layouts import QUOTA, QUOTA_SHARE, SPREAD, draw_traces, without_merging
from bench.peers.decisions import corners, covering, masks_of
from step_kernels.model import Trace

GRID, BATCH, COUNT, BLOCK = (16, 24), 3, 2, 8
CPU = torch.device("cpu")
EVERYBODY = slice(0, BATCH)


def quota(seed: int = 0, grid: tuple[int, int] = GRID) -> tuple[Trace, ...]:
    return draw_traces(QUOTA, COUNT, BATCH, grid, block=BLOCK, seed=seed, device=CPU)


def spread() -> Trace:
    return draw_traces(SPREAD, 1, BATCH, GRID, block=BLOCK, seed=0, device=CPU)[0]


@pytest.mark.parametrize("grid", [GRID, (15, 24), (3, 3)])
def test_quota_layouts_are_what_cts_can_take(grid: tuple[int, int]) -> None:
    shared = round(QUOTA_SHARE * (grid[0] // 2) * (grid[1] // 2))
    for trace in quota(grid=grid):
        trace.check(batch_size=BATCH, grid=grid, num_prefix=1, device=CPU, exits=(BLOCK,))
        trace.layout.validate()
        trace.stages[0].layout.validate()
        assert trace.layout.lengths().tolist() == [1 + grid[0] * grid[1] - 3 * shared] * BATCH
        assert set(trace.layout.cells[:, 3].tolist()) == {0, 1, 2}
    assert round(QUOTA_SHARE * 24 * 24) == 336  # of CTS: 2304 patches, 1296 tokens


def test_quota_draws_differ_between_images_and_inputs_and_repeat() -> None:
    one, other = quota()
    sides = one.layout.sides()
    assert not torch.equal(sides[0], sides[1])
    assert not torch.equal(sides, other.layout.sides())
    assert torch.equal(sides, quota()[0].layout.sides())
    assert not torch.equal(sides, quota(seed=1)[0].layout.sides())


def test_40_percent_halt() -> None:
    for trace in quota():
        (stage,) = trace.stages
        tokens = trace.layout.lengths().sum() - BATCH
        assert float(stage.halted.sum() / tokens) == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize("trace", [quota()[0], spread()], ids=["quota", "spread"])
def test_unmerged_patches_halt_with_the_token_that_covered_them(trace: Trace) -> None:
    alone = without_merging(trace)
    alone.check(batch_size=BATCH, grid=GRID, num_prefix=1, device=CPU, exits=(BLOCK,))
    assert (alone.layout.sides() == 1).all()
    assert torch.equal(alone.stages[0].layout.sides() > 0, trace.stages[0].layout.sides() > 0)
    assert not alone.stages[0].halted[alone.layout.cells[:, 3] == 0].any()


def test_masks_hold_a_whole_batch_where_counts_are_equal() -> None:
    trace = quota()[0]
    masks = masks_of(trace, (1, 2), EVERYBODY)
    assert masks is not None
    shared = round(QUOTA_SHARE * 8 * 12)
    assert masks.counts == (16 * 24 - 4 * shared, shared)
    painted = masks.blocks[1].int() + 2 * covering(masks.blocks[2], 2).int()
    assert torch.equal(painted, trace.layout.sides())
    halted = masks.halted[BLOCK]
    assert halted.shape == (BATCH, 1 + sum(masks.counts))
    assert not halted[:, 0].any()
    left = trace.stages[0].layout.lengths()
    assert torch.equal((~halted).sum(1, dtype=torch.int32), left)
    # The last token in the peers' order is the last shared block in raster order.
    for image in range(BATCH):
        row, col = masks.blocks[2][image].nonzero()[-1].tolist()
        assert bool(halted[image, -1]) == (int(trace.stages[0].layout.sides()[image, 2 * row, 2 * col]) == 0)


def test_masks_of_ragged_counts_hold_one_image() -> None:
    trace, sides = spread(), (1, 2, 4, 8, 16)
    assert masks_of(trace, sides, EVERYBODY) is None
    lengths = trace.layout.lengths().tolist()
    for image in range(BATCH):
        masks = masks_of(trace, sides, slice(image, image + 1))
        assert masks is not None
        assert 1 + sum(masks.counts) == lengths[image]
        assert masks.halted[BLOCK].shape == (1, lengths[image])


def test_equal_sums_of_unequal_sides_are_no_batch() -> None:
    """Four patches less and one block more in one image, the same number in all: nothing that one tensor could hold."""
    layout = quota()[0].layout
    sides = layout.sides()
    sides[0, :4, :8] = 2  # eight blocks of 2x2 ...
    sides[1, :4, :8] = 1
    sides[1, :4, :4] = 4  # ... or one of 4x4 and sixteen patches
    sides[2] = sides[0]
    changed = Trace(type(layout).from_sides(sides, num_prefix=1).trim())
    assert masks_of(changed, (1, 2, 4), EVERYBODY) is None


def test_corners_and_covering() -> None:
    cells = torch.arange(15).view(1, 3, 5)
    assert corners(cells, 2).tolist() == [[[0, 2]]]
    assert covering(corners(cells, 2), 2).tolist() == [[[0, 0, 2, 2], [0, 0, 2, 2]]]
    assert torch.equal(corners(covering(cells, 3), 3), cells)
