"""resolve_layout and from_sides on a GPU against the CPU reference."""

import pytest
import torch
from gpu.syncs import no_sync

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
    with sk.use_backend("reference"):
        expected = sk.resolve_layout(scores, thresholds=0.5, **settings)
        sides = expected.sides()
    on_gpu = [score.cuda() for score in scores]
    for thresholds in (0.5, torch.tensor(0.5, device="cuda")):
        with no_sync():
            layout = sk.resolve_layout(on_gpu, thresholds=thresholds, **settings)
        assert torch.equal(layout.cells.cpu(), expected.cells)
        assert torch.equal(layout.cu_seqlens.cpu(), expected.cu_seqlens)
    again = sk.SupertokenLayout.from_sides(sides.cuda(), num_prefix=num_prefix)
    assert torch.equal(again.cells.cpu(), expected.cells)


def test_a_captured_layout_replays_on_new_scores():
    scores = [torch.randn(4, 64 // side, 64 // side, device="cuda") for side in SIDES]
    decide = lambda: sk.resolve_layout(scores, sides=SIDES, thresholds=0.5, grid=(64, 64), num_prefix=1)  # noqa: E731
    decide()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout = decide()
    for _ in range(3):
        for score in scores:
            score.normal_()
        graph.replay()
        expected = decide()
        assert torch.equal(layout.cells, expected.cells) and torch.equal(layout.cu_seqlens, expected.cu_seqlens)
