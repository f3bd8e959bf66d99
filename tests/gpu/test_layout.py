"""resolve_layout and from_sides on a GPU against the CPU reference."""

import pytest
import torch
from floors import reference
from gpu.syncs import capture, no_sync
from layouts import same_layout

import step_kernels as sk

pytestmark = pytest.mark.gpu

# batch, grid, prefix tokens
SIZES = [(1, (1, 1), 0), (8, (64, 64), 1), (3, (17, 33), 5), (256, (32, 32), 1), (1, (1024, 1024), 1), (0, (4, 4), 1)]
SIDES = (2, 4, 8, 16)


@pytest.mark.parametrize(("batch", "grid", "num_prefix"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_equal_the_reference(batch, grid, num_prefix, dtype):
    scores = [torch.randn(batch, grid[0] // side, grid[1] // side).to(dtype) for side in SIDES]
    settings = {"sides": SIDES, "grid": grid, "num_prefix": num_prefix}
    expected = reference(sk.resolve_layout, scores, thresholds=0.5, **settings)
    sides = reference(expected.sides)
    on_gpu = [score.cuda() for score in scores]
    for thresholds in (0.5, torch.tensor(0.5, device="cuda")):
        with no_sync():
            layout = sk.resolve_layout(on_gpu, thresholds=thresholds, **settings)
        same_layout(layout, expected)
    same_layout(sk.SupertokenLayout.from_sides(sides.cuda(), num_prefix=num_prefix), expected)


def test_a_captured_layout_replays_on_new_scores():
    scores = [torch.randn(4, 64 // side, 64 // side, device="cuda") for side in SIDES]
    decide = lambda: sk.resolve_layout(scores, sides=SIDES, thresholds=0.5, grid=(64, 64), num_prefix=1)  # noqa: E731
    replay = capture(decide)
    for _ in range(3):
        for score in scores:
            score.normal_()
        same_layout(replay(), decide())
