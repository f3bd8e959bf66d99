"""resolve_layout and from_sides as kernels, against the reference."""

from dataclasses import replace

import pytest
import torch
from floors import reference
from interpreter import supervision
from layouts import AWKWARD, build, same_layout

import step_kernels as sk
from step_kernels.triton import layout as kernels_of_layout

# batch, grid, prefix tokens
SIZES = [
    (1, (1, 1), 0),
    (2, (3, 5), 1),
    (3, (17, 33), 5),
    (2, (40, 40), 1),
    (0, (4, 4), 1),
    (5, (1, 7), 0),
    (1, (64, 64), 1),
]


def random_scores(batch: int, grid: tuple[int, int], sides: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    scores = [torch.randn(batch, grid[0] // side, grid[1] // side).to(dtype) for side in sides]
    for score in scores:
        score.view(-1)[1:3] = float("nan")
    return scores


def check(scores: list[torch.Tensor], expected_scores: list[torch.Tensor] | None = None, **settings) -> None:
    """A layout that is valid, and the reference's: of the same scores, unless others are given."""
    ours = sk.resolve_layout(scores, **settings)
    same_layout(ours, reference(sk.resolve_layout, expected_scores or scores, **settings))
    if len(ours.cells) < 10**5:  # it takes seconds
        ours.validate()


@pytest.mark.parametrize(("batch", "grid", "num_prefix"), SIZES)
@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, 1)])
def test_resolve_layout(batch, grid, num_prefix, dtype, seed, kernels):
    supervision.shuffle_programs(seed)
    sides = (4, 2, 32, 8)
    scores = random_scores(batch, grid, sides, dtype)
    settings = {"sides": sides, "grid": grid, "num_prefix": num_prefix}
    for thresholds in (0.5, [0.5, -0.2, 0.9, 0.0], torch.tensor(0.5)):
        kernels.clear()
        check(scores, thresholds=thresholds, **settings)
        assert kernels == (["count_kernel", "scan_kernel", "write_kernel"] if batch else [])
    if not batch:
        kernels.append("an empty batch needs no kernel")


def test_many_images():
    scores = [torch.randn(256, 1, 1)]
    check(scores, sides=(2,), thresholds=0.0, grid=(2, 2), num_prefix=1)


def test_a_grid_of_a_million_cells(monkeypatch):
    monkeypatch.setattr(kernels_of_layout, "CHUNK", 2**16)  # the usual size would take the interpreter minutes
    grid, sides = (1024, 1024), (2, 16, 64)
    scores = random_scores(1, grid, sides, torch.float32)
    check(scores, sides=sides, thresholds=0.5, grid=grid, num_prefix=1)


def test_scores_of_any_strides():
    grid, sides = (8, 12), (2, 4)
    scores = random_scores(3, grid, sides, torch.float32)
    strided = [scores[0].permute(2, 1, 0).contiguous().permute(2, 1, 0), scores[1].expand(3, 2, 3)[:, :, ::1]]
    check(strided, scores, sides=sides, thresholds=0.0, grid=grid)


@pytest.mark.parametrize("chunk", [16, 64])
def test_images_of_many_chunks(chunk, monkeypatch):
    monkeypatch.setattr(kernels_of_layout, "CHUNK", chunk)
    monkeypatch.setattr(kernels_of_layout, "SCAN_BLOCK", 4)
    grid, sides = (24, 20), (2, 4, 8)
    scores = random_scores(3, grid, sides, torch.float32)
    check(scores, sides=sides, thresholds=0.3, grid=grid, num_prefix=5)


@pytest.mark.parametrize("name", [name for name, layout in AWKWARD.items() if layout.images])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_from_sides(name, dtype, kernels):
    plain = AWKWARD[name]
    expected = replace(build(plain, None), trimmed=False)
    sides = reference(expected.sides).to(dtype)
    kernels.clear()
    ours = sk.SupertokenLayout.from_sides(sides, num_prefix=plain.num_prefix)
    ours.validate()
    same_layout(ours, expected)
    assert kernels == ["count_kernel", "scan_kernel", "write_kernel"]


def test_from_sides_names_the_first_wrong_cell(kernels):
    with pytest.raises(ValueError, match="row 0, column 1"):
        sk.SupertokenLayout.from_sides(torch.tensor([[[1, 2], [1, 1]]]))
    kernels.append("the check comes before any kernel")
