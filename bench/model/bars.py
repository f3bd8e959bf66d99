"""The bars of DESIGN.md section 8 that rows of whole models decide: P1 - P5, P11, P14, P16.

Each is a ratio of two rows of one run: same model, batch size, spread layouts, 1024 px. A bar without its rows is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..kernels.schema import NOT_RUN
from ..schema import PASSED, Row
from .layouts import SPREAD
from .registry import DENSE, DENSE_OURS, EXACT_GRAPH, EXITS_STATIC, FRONT, MERGED_STATIC, UNSEARCHED
from .schema import NO_COSTS, ModelRow

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
        spread: the ratio's lowest and highest value with p20 - p80 of both times in the place of their medians; None where there is none.
        lacking: why there is no value, where the rows say so.
    """

    number: str
    what: str
    bar: float
    aim: float
    value: float | None
    at_most: bool = False
    problem: str | None = None
    spread: tuple[float, float] | None = None
    lacking: str | None = None

    @property
    def state(self) -> str:
        """ "met", "missed by 12%" (of the bar), or "not measured"."""
        if self.value is None:
            return NOT_MEASURED
        if self.problem is not None:
            return f"missed: {self.problem}"
        missed_by = (self.value / self.bar - 1) * (1 if self.at_most else -1)
        return MET if missed_by <= 0 else f"missed by {missed_by:.1%}"


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians, and its `Bar.spread`."""

    value: float
    spread: tuple[float, float] | None

    def times(self, factor: float) -> Ratio:
        """The same, multiplied."""
        spread = None if self.spread is None else (self.spread[0] * factor, self.spread[1] * factor)
        return Ratio(self.value * factor, spread)


def ratio_of(slow: ModelRow | Row | None, fast: ModelRow | Row | None) -> Ratio | None:
    """How many times faster the second one is; None where one of them is not there or was not timed."""
    if slow is None or fast is None or slow.median_ms is None or fast.median_ms is None:
        return None
    spread = None
    if slow.p20_ms is not None and slow.p80_ms is not None and fast.p20_ms is not None and fast.p80_ms is not None:
        spread = slow.p20_ms / fast.p80_ms, slow.p80_ms / fast.p20_ms
    return Ratio(slow.median_ms / fast.median_ms, spread)


def is_compiled(row: ModelRow) -> bool:
    """Whether a dense row is the baseline of the bars: compiled, its tail too; one that says what is lacking is a weaker one."""
    return row.compile_seconds is not None and (row.note is None or row.note.startswith(NO_COSTS))


class Lookup:
    """The rows that count, by contender, model and batch size."""

    def __init__(self, rows: Iterable[ModelRow]) -> None:
        self._asked = {
            (row.contender, row.model, row.batch): row
            for row in rows
            if row.layout == SPREAD and row.size == SIZE and row.device == MEASURED_ON and row.dtype == DTYPE
        }

    def row(self, contender: str, model: str, batch: int) -> ModelRow | None:
        """None where it is not there, did not pass, or is a dense model that was not compiled."""
        row = self._asked.get((contender, model, batch))
        return row if row is not None and _shortcoming(row) is None else None

    def ratio(self, slow: str, fast: str, model: str, batch: int) -> Ratio | None:
        """How many times faster the second contender is; None where one of them was not timed."""
        return ratio_of(self.row(slow, model, batch), self.row(fast, model, batch))

    def realised(self, slow: str, fast: str, model: str, batch: int) -> Ratio | None:
        """The same over the reduction of FLOPs."""
        ratio = self.ratio(slow, fast, model, batch)
        one, other = self.row(slow, model, batch), self.row(fast, model, batch)
        if ratio is None or one is None or other is None:
            return None
        return ratio.times(other.gflops / one.gflops)

    def caveat(self, contenders: Iterable[str], model: str, batch: int) -> str:
        """To be added to what is compared where dense is one of these and not as strong as it might be."""
        dense = self.row(DENSE, model, batch) if DENSE in contenders else None
        return f" ({DENSE} {UNSEARCHED})" if dense is not None and UNSEARCHED in (dense.variant or "") else ""

    def lacking(self, contenders: Iterable[str], model: str, batch: int) -> str | None:
        """What is wrong with the rows of these contenders, where there are rows."""
        for contender in contenders:
            row = self._asked.get((contender, model, batch))
            problem = None if row is None else _shortcoming(row)
            if problem is not None:
                return f"{contender}: {problem}"
        return None


def _shortcoming(row: ModelRow) -> str | None:
    """Why a row does not count."""
    if row.gate != PASSED:
        return row.problem if row.gate == NOT_RUN else row.gate
    if row.contender == DENSE and not is_compiled(row):
        return row.note or "not compiled"
    return None


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
            made.append(_bar(found, number, f"{what}, B={batch}", (bar, aim), (DENSE, contender), "large", batch))
    for batch in (8, 32):
        rivals = MERGED_STATIC, EXITS_STATIC
        made.append(_bar(found, "P3", f"exits on vs off, B={batch}", (1.10, 1.15), rivals, "large", batch))
    return made


def _realised(found: Lookup) -> list[Bar]:
    made = []
    for baseline in (DENSE, DENSE_OURS):
        for batch, bar, aim in ((8, 0.78, 0.90), (32, 0.83, 0.97)):
            what = f"realised speed-up / FLOP reduction against {baseline}, B={batch}"
            rivals = baseline, EXITS_STATIC
            made.append(_bar(found, "P4", what, (bar, aim), rivals, "large", batch, realised=True))
    return made


def _other_models(found: Lookup) -> list[Bar]:
    return [
        _bar(found, "P5", "merged vs dense, B=8", limits, (DENSE, MERGED_STATIC), model, 8)
        for model, limits in (("base", (2.2, 2.6)), ("small", (1.7, 2.2)))
    ]


def _costs(found: Lookup) -> list[Bar]:
    made = []
    for batch in (8, 32):
        what = f"policy + layout + merge, share of dense, B={batch}"
        made.append(_bar(found, "P11", what, (0.05, 0.02), (FRONT, DENSE), "large", batch, at_most=True))
    for batch in (1, 8):
        static = found.row(EXITS_STATIC, "large", batch)
        syncs = None if static is None else static.host_syncs
        problem = f"{syncs} host syncs" if syncs else "host syncs not counted" if syncs is None else None
        what = f"one static graph vs graphs at exactly these sizes, B={batch}"
        rivals = EXACT_GRAPH, EXITS_STATIC
        made.append(_bar(found, "P14", what, (0.95, 1.05), rivals, "large", batch, problem=problem))
    return [*made, _memory(found)]


def _memory(found: Lookup) -> Bar:
    own, dense = found.row(EXITS_STATIC, "large", 8), found.row(DENSE, "large", 8)
    memory, lacking = None, found.lacking((DENSE, EXITS_STATIC), "large", 8)
    if own is not None and dense is not None:
        if own.peak_memory_bytes is not None and dense.peak_memory_bytes:
            memory = own.peak_memory_bytes / dense.peak_memory_bytes
        else:
            lacking = NO_COSTS
    what = "ViT-L, peak memory, exits on vs dense, B=8"
    return Bar("P16", what, 1.0, 0.7, memory, at_most=True, lacking=None if memory is not None else lacking)


def _bar(
    found: Lookup,
    number: str,
    what: str,
    limits: tuple[float, float],
    rivals: tuple[str, str],
    model: str,
    batch: int,
    *,
    realised: bool = False,
    at_most: bool = False,
    problem: str | None = None,
) -> Bar:
    """A bar about a ratio of two contenders of one comparison, the slower one first."""
    ratio = (found.realised if realised else found.ratio)(*rivals, model, batch)
    return Bar(
        number,
        f"ViT-{model[0].upper()}, {what}{found.caveat(rivals, model, batch)}",
        *limits,
        None if ratio is None else ratio.value,
        at_most,
        problem,
        None if ratio is None else ratio.spread,
        None if ratio is not None else found.lacking(rivals, model, batch),
    )
