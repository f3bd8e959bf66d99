"""Policies that need no training: decisions against plain loops, awkward grids, quotas, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import photographs
from torch import Tensor

from step_kernels.model import OraclePolicy, PolicyNet, QuotaPolicy, VariancePolicy
from step_kernels.model.policies.base import Policy

GRIDS = [(1, 1), (1, 6), (3, 5), (8, 8), (17, 33)]
PATCH = 4


def images_of(grid: tuple[int, int], batch_size: int = 2) -> Tensor:
    return photographs(batch_size, grid[0] * PATCH, grid[1] * PATCH)


def labels_of(grid: tuple[int, int], batch_size: int = 2) -> Tensor:
    """Rectangles of classes with ignored pixels here and there."""
    height, width = grid[0] * PATCH, grid[1] * PATCH
    labels = torch.zeros(batch_size, height, width, dtype=torch.uint8)
    labels[0, height // 2 :, : width // 3] = 3
    labels[1, :, width // 2 :] = 7
    labels[torch.rand(labels.shape) < 0.05] = 255
    labels[0, : height // 4] = 255
    return labels


class FixedScores(Policy):
    """Scores given at construction."""

    def __init__(self, maps: dict[int, Tensor]) -> None:
        super().__init__(tuple(maps))
        self.maps = maps

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        return [self.maps[side] for side in self.sides]

    def score_thresholds(self, sides: list[int]) -> float:
        return 0.5


def plain_sides(take: list[dict[int, list[list[bool]]]], grid: tuple[int, int]) -> list[list[list[int]]]:
    """The side covering each cell, from each image's taken blocks, coarse to fine, by loops."""
    result = []
    for blocks in take:
        sides = [[0] * grid[1] for _ in range(grid[0])]
        for side in sorted(blocks, reverse=True):
            for row, line in enumerate(blocks[side]):
                for column, taken in enumerate(line):
                    cells = [(row * side + i, column * side + j) for i in range(side) for j in range(side)]
                    if taken and all(sides[i][j] == 0 for i, j in cells):
                        for i, j in cells:
                            sides[i][j] = side
        result.append([[side or 1 for side in line] for line in sides])
    return result


def block_of(image: Tensor, row: int, column: int, side: int) -> Tensor:
    size = side * PATCH
    return image[..., row * size : (row + 1) * size, column * size : (column + 1) * size]


def blocks_where(
    image: Tensor, grid: tuple[int, int], sides: tuple[int, ...], accept: Callable[[Tensor], bool]
) -> dict[int, list[list[bool]]]:
    return {
        side: [
            [accept(block_of(image, row, column, side)) for column in range(grid[1] // side)]
            for row in range(grid[0] // side)
        ]
        for side in sides
    }


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sides", [(2, 4, 8, 16), (8, 2), (4,)])
def test_variance_policy_takes_the_blocks_that_hardly_vary(grid: tuple[int, int], sides: tuple[int, ...]) -> None:
    images = images_of(grid)
    layout = VariancePolicy(0.5, sides)(images, patch_size=PATCH, num_prefix=1)

    def flat(block: Tensor) -> bool:
        return block.double().std((1, 2), correction=0).mean().item() < 0.5

    expected = plain_sides([blocks_where(image, grid, sides, flat) for image in images], grid)
    assert layout.sides().tolist() == expected
    assert layout.num_prefix == 1 and layout.grid == grid and layout.capacity == 2 * (1 + grid[0] * grid[1])


def test_variance_scores_are_accurate_on_a_large_offset() -> None:
    """E[x^2] - E[x]^2 in fp32 would lose every digit here."""
    noise = torch.randn(1, 3, 64, 64, dtype=torch.float64) * 0.01
    images = noise + 100
    scores = VariancePolicy(0.1).scores(images.float(), patch_size=PATCH)
    for side, score in zip((2, 4, 8, 16), scores, strict=True):
        blocks = noise.unflatten(3, (-1, side * PATCH)).unflatten(2, (-1, side * PATCH))
        expected = -blocks.std((3, 5), correction=0).mean(1)
        # The images themselves are rounded to 100 * 2^-24 = 6e-6 in fp32: 1e-3 of the deviation.
        torch.testing.assert_close(score.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("grid", [(8, 8), (9, 17), (3, 5)])
@pytest.mark.parametrize("reduction", [1.0, 1.3, 2.0])
def test_calibration_comes_as_close_as_the_images_allow(grid: tuple[int, int], reduction: float) -> None:
    images = images_of(grid, batch_size=3)
    policy = VariancePolicy.calibrate(images, reduction=reduction, patch_size=PATCH)
    target = 3 * grid[0] * grid[1] / reduction

    def excess(threshold: float) -> float:
        return abs(VariancePolicy(threshold)(images, patch_size=PATCH).num_tokens - target)

    maps = policy.scores(images, patch_size=PATCH)
    deviations = -torch.cat([score.flatten() for score in maps])
    thresholds = [0.0, *(math.nextafter(deviation, math.inf) for deviation in deviations.tolist())]
    best = min(map(excess, thresholds))
    assert excess(policy.threshold.item()) <= best


@pytest.mark.parametrize("grid", [(1, 1), (1, 6)])
def test_calibration_on_a_grid_without_blocks(grid: tuple[int, int]) -> None:
    policy = VariancePolicy.calibrate(images_of(grid), reduction=2.5, patch_size=PATCH)
    assert policy(images_of(grid), patch_size=PATCH).num_tokens == 2 * grid[0] * grid[1]


def test_calibration_takes_loaders_and_images_of_any_size() -> None:
    images = images_of((9, 17), batch_size=3)
    expected = VariancePolicy.calibrate(images, reduction=1.5, patch_size=PATCH).threshold
    dataset = torch.utils.data.TensorDataset(images, torch.arange(3))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    for given in (list(images), iter(images), loader, [(images[:1], "labels"), images[1:]]):
        assert torch.equal(VariancePolicy.calibrate(given, reduction=1.5, patch_size=PATCH).threshold, expected)
    # Of several sizes, some without a block: padded with zeros, and counted together.
    mixed = [images[0, :, :-1, :-3], images[1:, :, : 3 * PATCH - 2], images[0, :, :PATCH, :PATCH]]
    padded = [F.pad(mixed[0], (0, 3, 0, 1))[None], F.pad(mixed[1], (0, 0, 0, 2)), mixed[2][None]]
    policy = VariancePolicy.calibrate(mixed, reduction=1.5, patch_size=PATCH)

    def excess(threshold: float) -> float:
        counts = [VariancePolicy(threshold)(batch, patch_size=PATCH).num_tokens for batch in padded]
        return abs(sum(counts) - (9 * 17 + 2 * 3 * 17 + 1) / 1.5)

    maps = [score for batch in padded[:2] for score in policy.scores(batch, patch_size=PATCH)]
    deviations = -torch.cat([score.flatten() for score in maps])
    best = min(map(excess, [0.0, *(deviations * (1 + 1e-6)).tolist()]))
    assert excess(policy.threshold.item()) <= best < excess(0.0)


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_calibration_on_blank_images_takes_all_or_nothing(constant: float) -> None:
    images = torch.full((2, 3, 32, 32), constant)
    taken = VariancePolicy.calibrate(images, reduction=10, patch_size=PATCH, sides=(2,))
    left = VariancePolicy.calibrate(images, reduction=1, patch_size=PATCH, sides=(2,))
    assert taken(images, patch_size=PATCH).lengths().tolist() == [16, 16]
    assert left(images, patch_size=PATCH).lengths().tolist() == [64, 64]


@pytest.mark.parametrize("grid", GRIDS)
def test_quota_policy_merges_exactly_count_blocks_in_every_image(grid: tuple[int, int]) -> None:
    images = images_of(grid)
    blocks = (grid[0] // 2) * (grid[1] // 2)
    for count in sorted({0, blocks // 3, blocks}):
        layout = QuotaPolicy(VariancePolicy(0.1), count)(images, patch_size=PATCH, num_prefix=1)
        assert layout.lengths().tolist() == [1 + grid[0] * grid[1] - 3 * count] * 2
        assert (layout.sides() == 2).sum((1, 2)).tolist() == [4 * count] * 2


def test_quota_policy_takes_the_best_blocks_and_the_first_of_equals() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[[0.5, 0.9, 0.5], [0.5, nan, 0.1]], [[nan, -inf, nan], [nan, inf, -inf]]])
    images = torch.zeros(2, 3, 4 * PATCH, 6 * PATCH)
    scorer = FixedScores({2: scores})

    def chosen(count: int) -> list[list[list[bool]]]:
        return (QuotaPolicy(scorer, count)(images, patch_size=PATCH).sides()[:, ::2, ::2] == 2).tolist()

    assert chosen(1)[0] == [[False, True, False], [False, False, False]]
    assert chosen(2)[0] == [[True, True, False], [False, False, False]]
    assert chosen(4)[0] == [[True, True, True], [True, False, False]]
    assert chosen(5)[0] == [[True, True, True], [True, False, True]]
    assert chosen(1)[1] == [[False, False, False], [False, True, False]]
    assert chosen(3)[1] == [[True, True, False], [False, True, False]]  # NaN and -inf rank alike, last


def test_quota_policy_with_thousands_of_equal_scores() -> None:
    """An unstable sort would pick other blocks only at sizes like this."""
    images = torch.zeros(1, 3, 64 * PATCH, 64 * PATCH)
    layout = QuotaPolicy(VariancePolicy(0.0), 100)(images, patch_size=PATCH)
    taken = (layout.sides()[0, ::2, ::2] == 2).flatten()
    assert taken[:100].all() and not taken[100:].any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ignore_index", [255, 0])
def test_oracle_policy_takes_blocks_of_one_class(grid: tuple[int, int], ignore_index: int) -> None:
    labels = labels_of(grid)
    layout = OraclePolicy.from_labels(labels, ignore_index=ignore_index)(images_of(grid), patch_size=PATCH)

    def one_class(block: Tensor) -> bool:
        return len(set(block.flatten().tolist()) - {ignore_index}) <= 1

    expected = plain_sides([blocks_where(label, grid, (2, 4, 8, 16), one_class) for label in labels], grid)
    assert layout.sides().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_oracle_policy_pads_labels_with_ignored_pixels(dtype: torch.dtype) -> None:
    labels = torch.zeros(1, 13, 15, dtype=dtype)
    labels[0, 0, 0] = 1
    layout = OraclePolicy.from_labels(labels)(torch.zeros(1, 3, 16, 16), patch_size=PATCH)
    assert layout.sides().tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]]]


def test_oracle_policy_takes_blocks_without_any_label() -> None:
    labels = torch.arange(16 * 16, dtype=torch.int64).view(1, 16, 16)  # every labelled pixel another class
    labels[:, :8, 8:] = -1
    layout = OraclePolicy.from_labels(labels, ignore_index=-1)(torch.zeros(1, 3, 16, 16), patch_size=PATCH)
    assert layout.sides().tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 1, 1]]]


@pytest.mark.parametrize(("dtype", "ignore_index"), [(torch.int8, 255), (torch.uint8, -1), (torch.uint8, 257)])
def test_oracle_policy_ignores_nothing_for_an_index_that_the_labels_cannot_hold(
    dtype: torch.dtype, ignore_index: int
) -> None:
    """Compared in the labels' own dtype, these indices wrap to a label that occurs."""
    wrapped = (ignore_index - torch.iinfo(dtype).min) % 256 + torch.iinfo(dtype).min
    labels = torch.zeros(1, 8, 16, dtype=dtype)
    labels[0, 0, 0] = wrapped
    policy = OraclePolicy.from_labels(labels, ignore_index=ignore_index)
    assert policy(torch.zeros(1, 3, 8, 16), patch_size=PATCH).sides().tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2]]]


def test_thresholds_stay_fp32_and_on_the_modules_device_when_the_model_is_cast() -> None:
    policy = VariancePolicy(0.95).bfloat16()
    assert policy.threshold.dtype == torch.float32 and policy.threshold.item() == torch.tensor(0.95).item()
    net = PolicyNet(thresholds=(0.1, 0.2, 0.3, 0.95)).half()
    assert net.thresholds.dtype == torch.float32 and net.heads["2"].weight.dtype == torch.float16
    assert VariancePolicy(0.95).to("meta", torch.float16).threshold.device.type == "meta"
    state = VariancePolicy(0.95).state_dict()
    restored = VariancePolicy(0.0)
    restored.load_state_dict(state)
    assert restored.threshold.item() == torch.tensor(0.95).item()


def test_a_policy_says_its_thresholds() -> None:
    with pytest.raises(NotImplementedError):
        Policy().score_thresholds([2])
