"""Comparisons in the order of importance, and the minutes that they share."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..compiling import CompileBudget
from .layouts import SPREAD
from .settings import Settings

SPREAD_WEIGHT = 3  # how much more of the budget a comparison on spread layouts gets: more contenders, and the bars


@dataclass(frozen=True)
class Task:
    """One comparison.

    Attributes:
        model: preset of the ViT.
        batch: images per call.
        kind: of layouts.
        size: side of the images in pixels; None for every size of the run, one after the other.
        beside: no bar is about it, so it gets no more of the budget than the other kinds of layouts.
    """

    model: str
    batch: int
    kind: str
    size: int | None = None
    beside: bool = False

    @property
    def weight(self) -> int:
        """Its part of the budget relative to the others'."""
        return SPREAD_WEIGHT if self.kind == SPREAD and not self.beside else 1

    def __str__(self) -> str:
        return f"ViT {self.model}, {self.size} px, batch {self.batch}, {self.kind} layouts"


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


def tasks_of(settings: Settings) -> list[Task]:
    """Every comparison of `bench model`, in the order of importance.

    The first model at the first size comes at every batch size and on every kind of layouts; then the other models at the first batch
    size, which decide bars, too; then the first model's other sizes; then what is left of the other models. Kinds other than spread
    ask whether the counts matter and other sizes how speed-ups grow, not how fast it is: the first batch size is enough for both.
    Comparisons of one model at one size follow each other where that costs no bar: they share weights and compiled code.
    """
    (first, *others), (main, *sizes) = settings.models, settings.sizes
    batch, *batches = settings.batches
    spread = [kind for kind in settings.layouts if kind == SPREAD]
    kinds = [kind for kind in settings.layouts if kind != SPREAD]

    def at_main_size(model: str, batches: Sequence[int], *, beside: bool = False) -> list[Task]:
        return [Task(model, batch, kind, main, beside) for batch in batches for kind in spread]

    def of_kinds(model: str) -> list[Task]:
        return [Task(model, batch, kind, main) for kind in kinds]

    def at_sizes(model: str) -> list[Task]:
        return [Task(model, batch, kind, size, beside=True) for size in sizes for kind in spread]

    made = [*at_main_size(first, settings.batches), *of_kinds(first)]
    for model in others:
        made += [*at_main_size(model, [batch]), *of_kinds(model)]
    made += at_sizes(first)
    for model in others:
        made += [*at_main_size(model, batches, beside=True), *at_sizes(model)]
    return made


def at_every_size(tasks: Sequence[Task], sizes: Sequence[int]) -> list[Task]:
    """The tasks that have a size, then those without one at each size."""
    own = [task for task in tasks if task.size is not None]
    return own + [dataclasses.replace(task, size=size) for size in sizes for task in tasks if task.size is None]


def baselines_of(tasks: Sequence[Task]) -> set[tuple[str, int | None, int]]:
    """Model, size and batch of the dense models that tasks compare with; those that no bar needs are left out until their turn."""
    counted = [task for task in tasks if not task.beside or tasks[0].beside]
    return {(task.model, task.size, task.batch) for task in counted}
