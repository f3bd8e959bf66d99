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
        predictions: [B, tokens at the input, classes], log-probabilities, filled in place as tokens finish.
    """

    tokens: Tensor
    left: Tensor
    halted: dict[int, Tensor]
    predictions: Tensor

    def after(self, tokens: Tensor) -> Group:
        """The same images after a block."""
        return dataclasses.replace(self, tokens=tokens)


def start(tokens: Tensor, halted: dict[int, Tensor], classes: int) -> Group:
    """Everybody on the way."""
    everybody = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Group(tokens, everybody, halted, tokens.new_zeros(*tokens.shape[:2], classes))


def leave(group: Group, head: LinearExit, block: int) -> list[Group]:
    """One exit: predictions of those that halt, by boolean masks, and the others as one group for each image.

    Confidences are computed as in a free run, and replaced by the recorded decision before they are compared.
    """
    log_probabilities = head.head(head.norm(group.tokens)).log_softmax(2, dtype=torch.float32)
    recorded = group.halted[block][group.left].view(group.tokens.shape[:2])
    confidence = torch.where(recorded, CERTAIN, 0.0 * log_probabilities.exp().amax(2))
    halting = confidence > head.threshold
    finished = group.left.clone()
    finished[group.left] = halting.flatten()
    group.predictions[finished] = log_probabilities[halting].to(group.predictions.dtype)
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
    log_probabilities = scores.log_softmax(2, dtype=torch.float32)
    group.predictions[group.left] = log_probabilities.flatten(0, 1).to(group.predictions.dtype)
