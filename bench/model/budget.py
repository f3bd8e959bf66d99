"""Comparisons in the order of importance, and the minutes that they share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..compiling import CompileBudget
from .layouts import SPREAD

SPREAD_WEIGHT = 3  # how much more of the budget a comparison on spread layouts gets: more contenders, and the bars


@dataclass(frozen=True)
class Task:
    """One comparison."""

    model: str
    batch: int
    kind: str

    @property
    def weight(self) -> int:
        """Its part of the budget relative to the others'."""
        return SPREAD_WEIGHT if self.kind == SPREAD else 1


class Budget:
    """Minutes for everything but torch.compile, shared out over the comparisons that are left; unlimited where None."""

    def __init__(
        self, minutes: float | None, compiling: CompileBudget, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = math.inf if minutes is None else minutes * 60
        self._compiling, self._now, self._started = compiling, now, now()

    def spent(self) -> float:
        """Seconds since the start that no compiler is to blame for."""
        return self._now() - self._started - self._compiling.spent

    def left(self) -> float:
        """Seconds; none is the least."""
        return max(0.0, self._seconds - self.spent())

    def share(self, tasks: Sequence[Task]) -> float:
        """Seconds for the first of these."""
        return self.left() * tasks[0].weight / sum(task.weight for task in tasks)
