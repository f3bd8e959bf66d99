"""Early exits in eager PyTorch: confident tokens leave, what is left of each image goes on alone, in a Python loop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from step_kernels.model import LinearExit

CERTAIN = 2.0  # above any threshold of a probability


@dataclass(frozen=True)
class Group:
    """Images that go through the blocks together: a whole batch, or one image.

    Attributes:
        tokens: [B, left, D].
        left: bool [B, tokens at the input]: which of them these are.
        halted: as in `Masks`.
        predictions: [B, tokens at the input, classes], log-probabilities, written in place.
    """

    tokens: Tensor
    left: Tensor
    halted: dict[int, Tensor]
    predictions: Tensor

    def after(self, tokens: Tensor) -> Group:
        """The same images after a block."""
        return dataclasses.replace(self, tokens=tokens)

    @property
    def complete(self) -> bool:
        """Whether nobody has left, as the host knows."""
        return self.tokens.shape[1] == self.left.shape[1]

    def write(self, log_probabilities: Tensor) -> None:
        """Predictions of those that are left: [B, left, classes]."""
        if self.complete:
            self.predictions.copy_(log_probabilities)
        else:
            self.predictions[self.left] = log_probabilities.flatten(0, 1).to(self.predictions.dtype)


def start(tokens: Tensor, halted: dict[int, Tensor], classes: int) -> Group:
    """Everybody on the way."""
    everybody = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Group(tokens, everybody, halted, tokens.new_empty(*tokens.shape[:2], classes))


def leave(group: Group, head: LinearExit, block: int) -> list[Group]:
    """One exit: predictions of all, and those that do not halt as one group for each image.

    Who goes on writes a later prediction over that of this exit, as in DToP. Confidences are computed as in a free run, and replaced by
    the recorded decision before they are compared.
    """
    log_probabilities = head.head(head.norm(group.tokens)).log_softmax(2, dtype=torch.float32)
    group.write(log_probabilities)
    recorded = group.halted[block]
    if not group.complete:
        recorded = recorded[group.left].view(group.tokens.shape[:2])
    confidence = torch.where(recorded, CERTAIN, 0.0 * log_probabilities.amax(2).exp())
    halting = confidence > head.threshold
    finished = halting
    if not group.complete:
        finished = group.left.clone()
        finished[group.left] = halting.flatten()
    going_on = group.left & ~finished
    alone = []
    for image in range(group.tokens.shape[0]):
        here = slice(image, image + 1)
        alone.append(
            Group(
                group.tokens[image][~halting[image]][None],
                going_on[here],
                {number: mask[here] for number, mask in group.halted.items()},
                group.predictions[here],
            )
        )
    return alone


def finish(group: Group, scores: Tensor) -> None:
    """What the decoder makes of those that stayed to the end: scores [B, left, classes]."""
    group.write(scores.log_softmax(2, dtype=torch.float32))
