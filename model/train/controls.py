"""Controls: the same numbers of tokens, chosen at random. What a policy and exits are worth is what they are better by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import Halting, SupertokenLayout
from ..heads.exits import ExitHead
from ..policies.base import Policy, fitting_sides, grid_of

__all__ = ["RandomExit", "RandomPolicy"]


class RandomPolicy(Policy):
    """In each image as many blocks of each side as ``policy`` takes, at random places.

    Args:
        policy: whose numbers are kept.
        seed: of the draws, which go on from call to call.
    """

    def __init__(self, policy: Policy, seed: int = 0) -> None:
        super().__init__(policy.sides)
        self.policy, self.generator = policy, torch.Generator().manual_seed(seed)

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        """1 for the blocks that are drawn, 0 for the others. From the coarsest down: there is room for all of them."""
        grid = grid_of(images, patch_size)
        covered = self.policy(images, patch_size=patch_size).sides().cpu()
        free, maps = torch.ones_like(covered, dtype=torch.bool), []
        for side in reversed(fitting_sides(self.sides, grid)):
            counts = (covered == side).sum((1, 2)) // side**2
            rows, cols = grid[0] // side, grid[1] // side
            whole = free[:, : rows * side, : cols * side]
            fits = whole.unflatten(2, (cols, side)).unflatten(1, (rows, side)).all(4).all(2)
            # Blocks that fit come first, in random order; each image takes the first so many.
            draws = torch.rand(fits.shape, generator=self.generator, device="cpu") + ~fits
            order = draws.flatten(1).argsort(1).argsort(1)
            chosen = (order < counts[:, None]).view_as(fits)
            whole &= ~chosen.repeat_interleave(side, 1).repeat_interleave(side, 2)
            maps.append(chosen.float().to(images.device))
        return maps[::-1]

    def score_thresholds(self, sides: object) -> float:
        return 0.5


class RandomExit(ExitHead):
    """As many tokens of each image halt as ``head`` would halt, but random ones; what they write is ``head``'s.

    Args:
        head: whose scores and numbers are kept.
        seed: of the draws, which go on from call to call.
    """

    def __init__(self, head: ExitHead, seed: int = 0) -> None:
        with head.threshold.device:
            super().__init__(head.dim, head.num_classes, float(head.threshold), head.keep_per_class)
        self.head, self.generator = head, torch.Generator().manual_seed(seed)

    def scores(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        return self.head.scores(tokens, layout)

    def _halting(
        self, scores: Tensor, layout: SupertokenLayout, *, halted: Tensor | None = None, **named: Any
    ) -> Halting:
        if halted is None:
            own = super()._halting(scores, layout).halted
            image = layout.cells[:, 0].long()
            counts = torch.zeros_like(layout.lengths(), dtype=torch.int64).index_add_(0, image, own.long())
            draws = torch.rand(own.shape, generator=self.generator, device="cpu").to(own.device)
            draws = draws + 2 * image + (layout.cells[:, 3] == 0)  # prefix tokens come last in their image
            order = draws.argsort().argsort()
            halted = order - layout.cu_seqlens[:-1].long()[image] < counts[image]
        return super()._halting(scores, layout, halted=halted, **named)
