"""Policies: what decides, image by image, which blocks of patches become one supertoken.

A policy scores the blocks of each side and lets `resolve_layout` decide; nothing here waits for the host.
`PolicyNet`, the learned one, is in net.py; `OraclePolicy`, the one that knows the labels, in oracle.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from copy import deepcopy
from typing import Self

import torch
from torch import Tensor

from ... import SupertokenLayout, resolve_layout
from ...checks import check_int, check_number, check_sides, check_tensor
from ...numerics import accumulator
from ..precision import ThresholdModule

__all__ = ["Policy", "QuotaPolicy", "VariancePolicy", "fitting_sides"]

SIDES = (2, 4, 8, 16)


class Policy(ThresholdModule):
    """Base class: score maps per side -> layout.

    A subclass defines `scores` and `score_thresholds`; a block is taken when its score exceeds its side's threshold and
    no coarser taken block covers it: STEP's dCTS (arXiv 2509.14165).

    Args:
        sides: block sides in patches, powers of two from 2 to 64, each once, in any order; kept ascending.

    Raises:
        TypeError: ``sides`` is no sequence of ints, or empty.
        ValueError: a side is no such power of two, or comes twice.
    """

    def __init__(self, sides: Sequence[int] = SIDES) -> None:
        super().__init__()
        self.sides = tuple(sorted(check_sides("sides", sides, minimum=2)))

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        """Scores [B, rows // side, cols // side], one map for each side that fits the grid (see `fitting_sides`)."""
        raise NotImplementedError

    def score_thresholds(self, sides: Sequence[int]) -> float | Tensor | list[Tensor]:
        """Thresholds of these sides, as `resolve_layout` takes them."""
        raise NotImplementedError

    def deployed(self) -> Policy:
        """The policy as inference runs it, deciding alike to rounding: itself, unless a subclass has something to prepare."""
        return self

    def refresh_from(self, original: Policy) -> None:
        """Follow in place what changed in ``original``, whose `deployed` policy this is (else a ValueError)."""
        if original is not self:
            own, other = type(self).__name__, type(original).__name__
            raise ValueError(
                f"original: expected the {own} itself, which is its own deployed policy, got another {other}"
            )

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int = 0) -> SupertokenLayout:
        """Decide the layout of a batch.

        Args:
            images: [B, C, rows * patch_size, cols * patch_size], floating point.
            patch_size: pixels per side of a patch.
            num_prefix: prefix tokens of every image.

        Returns:
            An untrimmed layout (capacity B * (num_prefix + rows * cols)), without a host sync. Grids that a side does
            not divide keep side-1 tokens at the bottom and right.

        Raises:
            TypeError, ValueError: images of a wrong type or shape, or not padded to the patch size.
        """
        grid = grid_of(images, patch_size)
        sides = fitting_sides(self.sides, grid)
        if not sides:
            return SupertokenLayout.uniform(images.shape[0], grid, num_prefix=num_prefix, device=images.device)
        maps, thresholds = self.scores(images, patch_size=patch_size), self.score_thresholds(sides)
        return resolve_layout(maps, sides=sides, thresholds=thresholds, grid=grid, num_prefix=num_prefix)


class VariancePolicy(Policy):
    """Training-free: merges blocks whose pixels hardly vary.

    The score of a block is minus the standard deviation (population) of its pixels, averaged over the channels; it is
    taken when that deviation is below ``threshold``.

    Args:
        threshold: a standard deviation, in the units of the (normalised) images; kept in the 0-dim fp32 buffer
            ``threshold``. See `calibrate`.
        sides: as in `Policy`.

    Raises:
        TypeError: ``threshold`` is no number, or ``sides`` no sequence of ints.
        ValueError: ``sides`` as in `Policy`.
    """

    threshold: Tensor

    def __init__(self, threshold: float, sides: Sequence[int] = SIDES) -> None:
        super().__init__(sides)
        self.register_buffer("threshold", torch.tensor(check_number("threshold", threshold), dtype=torch.float32))

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        rows, cols = grid_of(images, patch_size)
        wide = images.to(accumulator(images.dtype))
        patches = wide.unflatten(3, (cols, patch_size)).unflatten(2, (rows, patch_size))
        variance, mean = torch.var_mean(patches, (3, 5), correction=0)
        side, maps = 1, []
        for wanted in fitting_sides(self.sides, (rows, cols)):
            while side < wanted:
                side *= 2
                # Law of total variance over the four quarters: no difference of large numbers, unlike E[x^2] - E[x]^2.
                between, merged_mean = torch.var_mean(quarters(mean), (3, 5), correction=0)
                variance, mean = quarters(variance).mean((3, 5)) + between, merged_mean
            maps.append(-variance.sqrt().mean(1))
        return maps

    def score_thresholds(self, sides: Sequence[int]) -> Tensor:
        return -self.threshold

    @classmethod
    def calibrate(
        cls, images: Tensor, *, reduction: float = 2.5, patch_size: int = 16, sides: Sequence[int] = SIDES
    ) -> Self:
        """The policy whose mean number of patch tokens on ``images`` is closest to rows * cols / ``reduction``.

        Bisection over the deviations that occur, so it is as close as these images allow. Syncs with the host.

        Args:
            images: [B, C, rows * patch_size, cols * patch_size], normalised as the model's input will be.
            reduction: how many times fewer tokens, at least 1.
            patch_size, sides: as in the policy.

        Raises:
            TypeError: ``reduction`` is no number, or another argument of a wrong type.
            ValueError: ``reduction`` below 1, or images that no policy takes.
        """
        reduction = check_number("reduction", reduction, minimum=1)
        rows, cols = grid_of(images, patch_size)
        policy = cls(0.0, sides).to(images.device)
        fitting = fitting_sides(policy.sides, (rows, cols))
        if not fitting:
            return policy
        maps = policy.scores(images, patch_size=patch_size)
        candidates = _cuts(-torch.cat([score.flatten() for score in maps]).float())

        def excess(index: int) -> float:
            """Tokens above the wished number at one candidate threshold; falls as the index rises."""
            layout = resolve_layout(maps, sides=fitting, thresholds=-candidates[index], grid=(rows, cols))
            return layout.num_tokens - images.shape[0] * rows * cols / reduction

        low = bisect_left(range(len(candidates) - 1), True, key=lambda index: excess(index) <= 0)
        best = min((index for index in (low - 1, low) if index >= 0), key=lambda index: abs(excess(index)))
        policy.threshold.copy_(candidates[best])
        return policy


class QuotaPolicy(Policy):
    """CTS: the ``count`` best 2x2 blocks of each image are merged, so every image has rows * cols - 3 * count patch tokens.

    Source: Lu et al., "Content-aware Token Sharing" (CVPR 2023). Ties go to the block that comes first in raster order;
    NaN scores come last.

    Args:
        scorer: a policy with side 2 among its sides, whose scores rank the blocks; its thresholds play no part.
        count: 2x2 blocks to merge in every image.

    Raises:
        TypeError: ``scorer`` is no `Policy`, or ``count`` no int.
        ValueError: ``scorer`` does not score side 2, or ``count`` is negative; when called, ``count`` is more than the
            blocks of the grid.
    """

    def __init__(self, scorer: Policy, count: int) -> None:
        super().__init__((2,))
        if not isinstance(scorer, Policy):
            raise TypeError(f"scorer: expected a Policy, got {type(scorer).__name__}")
        if 2 not in scorer.sides:
            raise ValueError(f"scorer: expected a policy that scores blocks of side 2, got sides {scorer.sides}")
        self.scorer = scorer
        self.count = check_int("count", count, minimum=0)

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        """1 for the chosen blocks, 0 for the others."""
        score = self.scorer.scores(images, patch_size=patch_size)[0].float()  # sides ascend: 2 comes first
        ranking = score.flatten(1).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best = ranking.sort(dim=1, descending=True, stable=True).indices[:, : self.count]
        chosen = torch.zeros_like(ranking).scatter_(1, best, 1.0)
        return [chosen.view_as(score)]

    def score_thresholds(self, sides: Sequence[int]) -> float:
        return 0.5

    def deployed(self) -> QuotaPolicy:
        """The same quota by the scorer's `deployed` policy."""
        scorer = self.scorer.deployed()
        return self if scorer is self.scorer else deepcopy(self, {id(self.scorer): scorer})

    def refresh_from(self, original: Policy) -> None:
        """Refresh the scorer from ``original``'s. TypeError or ValueError where that is no `QuotaPolicy` of this count."""
        if not isinstance(original, QuotaPolicy):
            raise TypeError(f"original: expected a QuotaPolicy, got {type(original).__name__}")
        if original.count != self.count:
            raise ValueError(f"original: expected count {self.count} as this copy has, got {original.count}")
        self.scorer.refresh_from(original.scorer)

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int = 0) -> SupertokenLayout:
        rows, cols = grid_of(images, patch_size)
        most = (rows // 2) * (cols // 2)
        if self.count > most:
            raise ValueError(
                f"count: expected at most {most}, the 2x2 blocks of a {rows} x {cols} grid, got {self.count}"
            )
        return super().forward(images, patch_size=patch_size, num_prefix=num_prefix)


def fitting_sides(sides: Sequence[int], grid: tuple[int, int]) -> list[int]:
    """The sides of which at least one block fits into ``grid``, ascending."""
    return sorted(side for side in sides if side <= min(grid))


def grid_of(images: Tensor, patch_size: int) -> tuple[int, int]:
    """The patch grid of images that are padded already; refuses others."""
    check_int("patch_size", patch_size, minimum=1)
    check_tensor("images", images, ("B", "C", "H", "W"))
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"images: expected height and width padded to multiples of patch_size={patch_size}, got {height} x {width}"
        )
    return height // patch_size, width // patch_size


def quarters(values: Tensor) -> Tensor:
    """[..., rows, cols] -> [..., rows // 2, 2, cols // 2, 2]; an odd last row or column is dropped."""
    rows, cols = values.shape[-2] // 2, values.shape[-1] // 2
    return values[..., : 2 * rows, : 2 * cols].unflatten(-1, (cols, 2)).unflatten(-3, (rows, 2))


def _cuts(values: Tensor) -> Tensor:
    """Thresholds that separate the distinct ``values``: zero, one between each two neighbours, one above all."""
    distinct = values[~values.isnan()].unique()
    if not distinct.numel():
        return values.new_zeros(1)
    middle = (distinct[:-1] + distinct[1:]) / 2
    middle = torch.where(middle > distinct[:-1], middle, distinct[1:])  # neighbours one rounding step apart
    return torch.cat([values.new_zeros(1), middle, distinct[-1:] + 1])
