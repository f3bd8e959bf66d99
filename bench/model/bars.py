"""The bars of DESIGN.md section 8 that rows of whole models decide: P1 - P5, P11, P14, P16.

Each is a ratio of two rows of one run: same model, batch size, spread layouts, 1024 px. A bar without its rows is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..schema import PASSED
from .layouts import SPREAD
from .registry import DENSE, DENSE_OURS, EXACT_GRAPH, EXITS_STATIC, FRONT, MERGED_STATIC
from .schema import ModelRow

SIZE = 1024
MEASURED_ON, DTYPE = "cuda", "bfloat16"
DECIDING = frozenset(
    {DENSE, DENSE_OURS, EXACT_GRAPH, EXITS_STATIC, FRONT, MERGED_STATIC}
)  # contenders that bars are about
NOT_MEASURED, MET = "not measured", "met"


@dataclass(frozen=True)
class Bar:
    """One bar and what was measured.

    Attributes:
        number: such as "P1".
        what: what is compared.
        bar, aim: to be reached, and hoped for.
        value: measured; None where the rows are not there.
        at_most: the value must not be above the bar, instead of not below it.
        problem: why it is missed whatever the value.
    """

    number: str
    what: str
    bar: float
    aim: float
    value: float | None
    at_most: bool = False
    problem: str | None = None

    @property
    def state(self) -> str:
        """ "met", "missed by 12%" (of the bar), or "not measured"."""
        if self.value is None:
            return NOT_MEASURED
        if self.problem is not None:
            return f"missed: {self.problem}"
        missed_by = (self.value / self.bar - 1) * (1 if self.at_most else -1)
        return MET if missed_by <= 0 else f"missed by {missed_by:.1%}"


def is_compiled(row: ModelRow) -> bool:
    """Whether a dense row is the baseline of the bars: compiled, its tail too; one that says what is lacking is a weaker one."""
    return row.compile_seconds is not None and row.note is None


class Lookup:
    """The rows that count, by contender, model and batch size."""

    def __init__(self, rows: Iterable[ModelRow]) -> None:
        self._rows = {
            (row.contender, row.model, row.batch): row
            for row in rows
            if row.layout == SPREAD
            and row.size == SIZE
            and row.device == MEASURED_ON
            and row.gate == PASSED
            and row.dtype == DTYPE
            and (row.contender != DENSE or is_compiled(row))
        }

    def row(self, contender: str, model: str, batch: int) -> ModelRow | None:
        return self._rows.get((contender, model, batch))

    def times(self, slow: str, fast: str, model: str, batch: int) -> float | None:
        """How many times faster the second contender is; None where one of them was not timed."""
        one, other = self.row(slow, model, batch), self.row(fast, model, batch)
        if one is None or other is None or one.median_ms is None or other.median_ms is None:
            return None
        return one.median_ms / other.median_ms

    def realised(self, slow: str, fast: str, model: str, batch: int) -> float | None:
        """The same over the reduction of FLOPs."""
        times = self.times(slow, fast, model, batch)
        one, other = self.row(slow, model, batch), self.row(fast, model, batch)
        if times is None or one is None or other is None:
            return None
        return times * other.gflops / one.gflops


def bars(rows: Sequence[ModelRow]) -> list[Bar]:
    """Every bar that rows of this kind can decide, in the order of DESIGN.md, measured or not."""
    found = Lookup(rows)
    return [*_speedups(found), *_realised(found), *_other_models(found), *_costs(found)]


def _speedups(found: Lookup) -> list[Bar]:
    made = []
    for number, what, contender, limits in (
        ("P1", "merged vs dense", MERGED_STATIC, ((1, 2.0, 2.3), (8, 2.6, 3.0), (32, 2.8, 3.3))),
        ("P2", "merged + exits vs dense", EXITS_STATIC, ((1, 2.3, 2.6), (8, 3.0, 3.4), (32, 3.2, 3.8))),
    ):
        for batch, bar, aim in limits:
            value = found.times(DENSE, contender, "large", batch)
            made.append(Bar(number, f"ViT-L, {what}, B={batch}", bar, aim, value))
    for batch in (8, 32):
        value = found.times(MERGED_STATIC, EXITS_STATIC, "large", batch)
        made.append(Bar("P3", f"ViT-L, exits on vs off, B={batch}", 1.10, 1.15, value))
    return made


def _realised(found: Lookup) -> list[Bar]:
    return [
        Bar(
            "P4",
            f"ViT-L, realised speed-up / FLOP reduction against {baseline}, B={batch}",
            bar,
            aim,
            found.realised(baseline, EXITS_STATIC, "large", batch),
        )
        for baseline in (DENSE, DENSE_OURS)
        for batch, bar, aim in ((8, 0.78, 0.90), (32, 0.83, 0.97))
    ]


def _other_models(found: Lookup) -> list[Bar]:
    return [
        Bar(
            "P5", f"ViT-{model[0].upper()}, merged vs dense, B=8", bar, aim, found.times(DENSE, MERGED_STATIC, model, 8)
        )
        for model, bar, aim in (("base", 2.2, 2.6), ("small", 1.7, 2.2))
    ]


def _costs(found: Lookup) -> list[Bar]:
    made = []
    for batch in (8, 32):
        value = found.times(FRONT, DENSE, "large", batch)
        what = f"ViT-L, policy + layout + merge, share of dense, B={batch}"
        made.append(Bar("P11", what, 0.05, 0.02, value, at_most=True))
    for batch in (1, 8):
        static = found.row(EXITS_STATIC, "large", batch)
        syncs = None if static is None else static.host_syncs
        problem = f"{syncs} host syncs" if syncs else "host syncs not counted" if syncs is None else None
        value = found.times(EXACT_GRAPH, EXITS_STATIC, "large", batch)
        what = f"ViT-L, one static graph vs graphs at exactly these sizes, B={batch}"
        made.append(Bar("P14", what, 0.95, 1.05, value, problem=problem))
    own, dense = found.row(EXITS_STATIC, "large", 8), found.row(DENSE, "large", 8)
    memory = None
    if own is not None and dense is not None and own.peak_memory_bytes is not None and dense.peak_memory_bytes:
        memory = own.peak_memory_bytes / dense.peak_memory_bytes
    made.append(Bar("P16", "ViT-L, peak memory, exits on vs dense, B=8", 1.0, 0.7, memory, at_most=True))
    return made
