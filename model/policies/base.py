"""Policies: what decides, image by image, which blocks of patches become one supertoken.

A policy scores the blocks of each side and lets `resolve_layout` decide; nothing here waits for the host.
`PolicyNet`, the learned one, is in net.py; `OraclePolicy`, the one that knows the labels, in oracle.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ... import SupertokenLayout, resolve_layout
from ...checks import check_int, check_number, check_sides, check_tensor
from ...modules import check_uncalled
from ...numerics import accumulator
from ..images import pad_images
from ..precision import ThresholdModule
from .calibration import TokenCounts, batches_of

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

    settings: ClassVar[tuple[str, ...]] = ("sides",)

    def __init__(self, sides: Sequence[int] = SIDES) -> None:
        super().__init__()
        self.sides = tuple(sorted(check_sides("sides", sides)))

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
            ``threshold``, which ``policy.threshold = 0.1`` fills in place. See `calibrate`.
        sides: as in `Policy`.

    Raises:
        TypeError: ``threshold`` is no number, or ``sides`` no sequence of ints.
        ValueError: ``threshold`` is negative or NaN; ``sides`` as in `Policy`.
    """

    threshold_limit = None
    settings = ("threshold", "sides")
    threshold: Tensor

    def __init__(self, threshold: float, sides: Sequence[int] = SIDES) -> None:
        super().__init__(sides)
        self.add_threshold("threshold", threshold)

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
    @torch.no_grad()
    def calibrate(
        cls, images: Iterable[Any], *, reduction: float = 2.5, patch_size: int = 16, sides: Sequence[int] = SIDES
    ) -> Self:
        """The policy that leaves, of all patches of ``images``, closest to one token for ``reduction`` of them.

        As close as these images allow. Syncs with the host. Memory: one batch at a time, and two numbers per block.

        Args:
            images: [B, C, H, W], normalised as the model's input will be, of any size: padded as the model pads. Or an iterable, read once, of such
                batches or single images [C, H, W], also of different sizes; a loader that yields tuples or lists, images first, is one.
            reduction: how many times fewer tokens, at least 1.
            patch_size, sides: as in the policy.

        Raises:
            TypeError: ``reduction`` is no number, or another argument of a wrong type.
            ValueError: ``reduction`` below 1, no images, or images of a wrong shape.
        """
        reduction = check_number("reduction", reduction, minimum=1)
        check_int("patch_size", patch_size, minimum=1)
        with torch.device("cpu"):  # whatever PyTorch's default device is
            policy = cls(0.0, sides)
        counts, batch = TokenCounts(), None
        for batch in batches_of(images):
            like = batch.new_empty(1, batch.shape[1], patch_size, patch_size)  # a patch embedding's weight
            pixels, grid = pad_images(batch, like)
            fitting = fitting_sides(policy.sides, grid)
            maps = policy.scores(pixels, patch_size=patch_size) if fitting else []
            counts.add([-score for score in maps], fitting, batch.shape[0] * grid[0] * grid[1])
        if batch is None:
            raise ValueError("images: expected at least one image, got none")
        policy.threshold.copy_(counts.threshold(reduction))
        return policy.to(batch.device)


class QuotaPolicy(Policy):
    """CTS: the ``count`` best 2x2 blocks of each image are merged, so every image has rows * cols - 3 * count patch tokens.

    Source: Lu et al., "Content-aware Token Sharing" (CVPR 2023). Ties go to the block that comes first in raster order;
    NaN scores come last.

    Args:
        scorer: a policy with side 2 among its sides, whose scores rank the blocks; its thresholds play no part.
        count: 2x2 blocks to merge in every image.

    Raises:
        TypeError: ``scorer`` is no `Policy`, or ``count`` no int.
        ValueError: ``scorer`` does not score side 2, or ``count`` is negative; when called, ``count`` is more than the blocks of the grid.
    """

    settings = ("count",)

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
        check_uncalled("scorer", self.scorer)
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
