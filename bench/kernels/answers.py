"""Under the clock: inputs are written anew before every timed call, and one timed answer of each contender is kept for the gate."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from .contenders import Contender
from .examples import distinct_canvases, distinct_numbers
from .operation import Outputs


@dataclass(frozen=True)
class Answer:
    """What a timed call gave, tails cut off: the number of its input, and copies of its outputs."""

    number: int
    outputs: Outputs


class Answers:
    """Of each contender one of its timed calls on inputs that the gate has a truth of, each as likely as the others."""

    def __init__(self, contenders: Iterable[Contender], compared: Collection[int]) -> None:
        self._contenders = {contender.name: contender for contender in contenders}
        self._compared = compared
        self._calls: Counter[str] = Counter()
        self._random = random.SystemRandom()  # nobody knows which
        self.of: dict[str, Answer] = {}

    def keep(self, name: str, number: int, result: Any) -> None:
        """After a timed call, before the next one; whoever is no contender is passed over, as is an input without truth."""
        contender = self._contenders.get(name)
        if contender is None or number not in self._compared:
            return
        self._calls[name] += 1
        if self._random.randrange(self._calls[name]) == 0:
            outputs = contender.live(result, contender.examples[number])
            self.of[name] = Answer(number, tuple(output.detach().clone() for output in outputs))


def renewal(contenders: Iterable[Contender]) -> Callable[[int], None]:
    """Writes every number of one input anew, whoever's it is, and canvases back: an answer kept for its memory and version is of another
    version, and what an earlier call has painted is gone."""
    forms = list(zip(*(contender.examples for contender in contenders), strict=True))
    numbers, painted = [*map(distinct_numbers, forms)], [*map(distinct_canvases, forms)]

    def renew(number: int) -> None:
        for tensor in numbers[number]:
            tensor.mul_(1)
        for example in painted[number]:
            example.reset()

    return renew
