"""The peers put together: each builder makes one of them on a `Case`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from step_kernels.model import Trace
from step_kernels.model.vit import Block

from ..kernels.operation import Unavailable
from ..kernels.plain import upsample_argmax
from ..model.case import DENSE, EXITS, MERGED, MERGED_EXITS, Case
from ..model.registry import Built
from ..settings import PATCH_SIZE
from .attention import Attend, sdpa, stored_scores, transformer_block
from .decisions import Decisions, decisions_of, masks_of
from .exits import Group, finish, leave, start
from .sharing import ask_for_quota, ask_for_sides, back_to_cells, positions, shared_tokens, superpatches

NOT_EQUAL = "needs the same number of tokens in every image, and 2x2 blocks alone"
ONE_PATCH = (1,)  # sides: nothing is merged
CTS_SIDES = (1, 2)


@dataclass(frozen=True)
class Recipe:
    """What a peer is made of.

    Attributes:
        family: whose decisions it repeats.
        attend: the attention.
        per_image: the images go through the blocks one by one, since their counts differ; else together up to the first exit.
    """

    family: str
    attend: Attend
    per_image: bool = False

    def sides(self, case: Case) -> tuple[int, ...]:
        """Sides of the blocks that it knows."""
        if self.family in (DENSE, EXITS):
            return ONE_PATCH
        return (1, *case.weights.policy.sides) if self.per_image else CTS_SIDES

    def groups(self, batch: int) -> list[slice]:
        """The images that go through the first block together."""
        return [slice(image, image + 1) for image in range(batch)] if self.per_image else [slice(0, batch)]


class PeerModel:
    """A peer's forward pass, with the parameters of a case.

    Raises:
        Unavailable: it cannot repeat the decisions of the case.
    """

    def __init__(self, case: Case, recipe: Recipe) -> None:
        self._case, self._weights, self._recipe = case, case.weights, recipe
        self._classes = case.settings.classes
        self._exits = case.weights.exits if recipe.family in (EXITS, MERGED_EXITS) else {}
        self._sides = tuple(side for side in recipe.sides(case) if side <= min(case.grid))
        self._decisions = [self._recorded(trace) for trace in case.decisions(recipe.family)]
        self._policy = copy.copy(case.weights.policy)
        self._policy.sides = tuple(side for side in self._policy.sides if side in self._sides)  # scores of no others

    def _recorded(self, trace: Trace) -> Decisions:
        found = [masks_of(trace, self._sides, images) for images in self._recipe.groups(self._case.batch)]
        masks = [one for one in found if one is not None]
        cells = self._case.grid[0] * self._case.grid[1]
        covered = (sum(c * s * s for c, s in zip(one.counts, self._sides, strict=True)) for one in masks)
        if len(masks) < len(found) or any(number != cells for number in covered):
            raise Unavailable(NOT_EQUAL)
        return decisions_of(masks)

    @torch.no_grad()
    def labels(self, number: int) -> Tensor:
        """Labels [batch, size, size] of an input, the policy asked and not listened to."""
        self._ask_policy(number)
        return upsample_argmax(self.scores(number), (self._case.size, self._case.size))

    @torch.no_grad()
    def scores(self, number: int) -> Tensor:
        """Class scores [batch, classes, rows, cols] of an input; log-probabilities with exits."""
        sequences, decisions = self._tokens(number), self._decisions[number]
        if self._exits:
            groups = [start(x, one.halted, self._classes) for x, one in zip(sequences, decisions.groups, strict=True)]
            self._run_with_exits(groups)
            predictions = [group.predictions for group in groups]
        else:
            for block in self._blocks():
                sequences = [transformer_block(block, x, self._recipe.attend) for x in sequences]
            predictions = [self._decoded(x) for x in sequences]
        prefix, grid = self._weights.vit.num_prefix, self._case.grid
        cells = [x[:, prefix:] for x in predictions]
        if self._sides == ONE_PATCH:
            return cells[0].transpose(1, 2).unflatten(2, grid)
        return back_to_cells(cells, decisions, grid)

    def _run_with_exits(self, groups: list[Group]) -> None:
        """Fills the groups' predictions. After the first exit every block runs once for each image, as in DToP."""
        for number, block in enumerate(self._blocks(), start=1):
            groups = [group.after(transformer_block(block, group.tokens, self._recipe.attend)) for group in groups]
            if number in self._exits:
                groups = [alone for group in groups for alone in leave(group, self._exits[number], number)]
        for group in groups:
            finish(group, self._decoded(group.tokens))

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self._weights.vit.blocks)

    def _decoded(self, tokens: Tensor) -> Tensor:
        return self._weights.decoder.head(self._weights.vit.norm(tokens))

    def _tokens(self, number: int) -> list[Tensor]:
        """The encoder's input: [B, tokens, D] of the images that start together."""
        vit, images, grid = self._weights.vit, self._case.inputs[number], self._case.grid
        if self._sides == ONE_PATCH:
            patches = vit.patch_embed(images) + vit.grid_positions(grid)
            return [torch.cat([vit.prefix_tokens().expand(images.shape[0], -1, -1), patches], 1)]
        blocks = {side: superpatches(images, side, PATCH_SIZE) for side in self._sides}
        places = {side: positions(vit, grid, side) for side in self._sides}
        return shared_tokens(vit, blocks, places, self._decisions[number])

    def _ask_policy(self, number: int) -> None:
        """The policy's work and the masks that follow from its scores; both dropped."""
        policy, images = self._policy, self._case.inputs[number]
        if self._sides == ONE_PATCH:
            return
        if self._recipe.per_image:
            ask_for_sides(policy, images, PATCH_SIZE)
        else:
            ask_for_quota(policy, images, PATCH_SIZE, self._decisions[number].groups[0].counts[1])


def peer(case: Case, *, recipe: Recipe) -> Built:
    """Builder of the peer of a recipe."""
    model = PeerModel(case, recipe)
    return Built(model.labels, model.scores, variant="eager")


def _peer(family: str, attend: Attend, *, per_image: bool = False) -> Callable[[Case], Built]:
    return functools.partial(peer, recipe=Recipe(family, attend, per_image))


dense, dense_sdpa = _peer(DENSE, stored_scores), _peer(DENSE, sdpa)
cts, cts_sdpa = _peer(MERGED, stored_scores), _peer(MERGED, sdpa)
dtop, dtop_sdpa = _peer(EXITS, stored_scores), _peer(EXITS, sdpa)
cts_dtop, cts_dtop_sdpa = _peer(MERGED_EXITS, stored_scores), _peer(MERGED_EXITS, sdpa)
step = _peer(MERGED_EXITS, stored_scores, per_image=True)
step_sdpa = _peer(MERGED_EXITS, sdpa, per_image=True)
