"""The comparisons of `python -m bench peers`, on the machinery of `bench model`."""

from __future__ import annotations

from collections.abc import Mapping

from ..model.case import Case
from ..model.clocking import Raised, tidy
from ..model.measure import Bench, Task
from ..model.registry import Built
from ..model.rows import noted
from ..model.schema import ModelRow
from ..model.settings import Settings
from ..schema import PASSED
from ..timing import Timings
from .registry import PEERS, TOME
from .tome import Beside


class PeerBench(Bench):
    """A run over models, batch sizes and kinds of layouts.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, PEERS)
        self._tome_note: str | None = None

    def tasks(self) -> list[Task]:
        """Every kind at every batch size, in the order in which they were asked for."""
        asked = self.settings
        return [Task(model, batch, kind) for model in asked.models for batch in asked.batches for kind in asked.layouts]

    def measure(self, case: Case, seconds: float) -> list[ModelRow]:
        """As in `bench model`; what was timed of ToMe at r > 0 is in the note of its row at r = 0."""
        self._tome_note = None
        rows = super().measure(case, seconds)
        return [noted(row, self._tome_note) if row.contender == TOME and row.gate == PASSED else row for row in rows]

    def time(self, case: Case, ready: Mapping[str, Built], seconds: float) -> dict[str, Timings]:
        """Times the contenders, and in the same rounds ToMe at r > 0 where r = 0 is right; if that raises, they are timed without it."""
        if TOME not in ready:
            return super().time(case, ready, seconds)
        tome, stop = Beside(case), self.budget.spent() + seconds
        while True:
            try:
                timings = super().time(case, {**ready, **tome.contenders}, stop - self.budget.spent())
            except Raised as raised:
                if raised.name not in tome.contenders:
                    raise
                tome.give_up(raised)
                tidy(case.device)
            else:
                self._tome_note = tome.note(timings)
                return timings
