"""The inputs under the clock: written anew before every timed call, and one timed answer of each contender kept to be compared.

An answer that was kept from the gate or from an earlier round answers another question, whatever it was kept by: address, number,
version or content. And what is compared after the clock came out of a timed call, so a contender cannot do its work for the gate alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

DIMMEST, BRIGHTEST = 0.95, 1.05


def redrawn(images: Tensor, random: random.Random) -> Tensor:
    """[batch, 3, height, width] with colours exchanged, and brighter or darker by a little."""
    return images.roll(random.choice((1, 2)), 1).mul_(random.uniform(DIMMEST, BRIGHTEST))


@dataclass(frozen=True)
class Answer:
    """What a timed call was shown, and its labels.

    Attributes:
        number: of the input.
        images: [batch, 3, size, size], a copy.
        labels: a copy, or whatever came instead of a tensor.
    """

    number: int
    images: Tensor
    labels: Any


class Renewed:
    """Writes inputs in their own memory before every timed call, `redrawn` at random.

    The decisions of a policy that is executed under the clock stay nearly the same ones that way, and with them its work.

    Args:
        inputs: [batch, 3, size, size] each.

    Attributes:
        answers: by contender, of one of its timed calls, each as likely as the others.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs, self._originals = inputs, [images.clone() for images in inputs]
        self._calls: Counter[str] = Counter()
        self._random = random.SystemRandom()  # nobody knows what comes
        self.answers: dict[str, Answer] = {}

    def write(self, number: int) -> None:
        """Before a timed call."""
        self._inputs[number].copy_(redrawn(self._originals[number], self._random))

    def keep(self, name: str, number: int, labels: Any) -> None:
        """After a timed call, before the next one, with whatever it returned."""
        self._calls[name] += 1
        if self._random.randrange(self._calls[name]) == 0:
            # A copy of what is no plain tensor could be better than what the clock saw: it is judged as it is.
            kept = labels.clone() if type(labels) is Tensor else labels
            self.answers[name] = Answer(number, self._inputs[number].clone(), kept)

    def restore(self) -> None:
        """Every input as it was."""
        for images, original in zip(self._inputs, self._originals, strict=True):
            images.copy_(original)
