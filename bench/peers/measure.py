"""The comparisons of `python -m bench peers`, on the machinery of `bench model`."""

from __future__ import annotations

from ..model.measure import Bench, Task
from ..model.settings import Settings
from .registry import PEERS


class PeerBench(Bench):
    """A run over models, batch sizes and kinds of layouts.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, PEERS)

    def tasks(self) -> list[Task]:
        """Every kind at every batch size, in the order in which they were asked for."""
        asked = self.settings
        return [Task(model, batch, kind) for model in asked.models for batch in asked.batches for kind in asked.layouts]
