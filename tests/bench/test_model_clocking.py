"""A contender of `bench model` that raises under the clock or after it: it has no time, and the others keep theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_model_cases import CPU, nano_case, nano_preset, nano_settings
from torch import Tensor

from bench.kernels.schema import NOT_RUN
from bench.model import measure
from bench.model.bars import is_compiled
from bench.model.clocking import Raised, Watched, tidy, without_who_raises
from bench.model.costs import Costs
from bench.model.measure import Bench
from bench.model.registry import DENSE, EXITS_EXACT, MERGED_EXACT, Built, Contender
from bench.model.schema import COST_FIELDS, NO_COSTS, ModelRow
from bench.schema import PASSED
from bench.timing import Timings

NAMES = (DENSE, EXITS_EXACT, MERGED_EXACT)
FULL = torch.OutOfMemoryError("CUDA out of memory.\nmore")


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


def measured(monkeypatch: pytest.MonkeyPatch, **changes: Callable[[Built], Built]) -> dict[str, ModelRow]:
    """Rows of a comparison in which contenders do something else than they do."""
    real = Contender.build

    def build(one: Contender, case: Any) -> Built:
        built = real(one, case)
        return changes[one.name](built) if one.name in changes else built

    monkeypatch.setattr(Contender, "build", build)
    rows = Bench(nano_settings(contenders=NAMES)).measure(nano_case(batch=1), float("inf"))
    return {row.contender: row for row in rows}


def raising(after: int, error: Exception = FULL, *, scores: bool = False) -> Callable[[Built], Built]:
    """Labels (or scores) raise from a call on; the gate makes two of each, with one warm-up call of labels after it."""

    def change(built: Built) -> Built:
        calls: list[int] = []

        def counted(real: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
            def call(number: int) -> Tensor:
                calls.append(number)
                if len(calls) > after:
                    raise error
                return real(number)

            return call

        if scores:
            return dataclasses.replace(built, scores=counted(built.scores))
        return dataclasses.replace(built, labels=counted(built.labels))

    return change


@pytest.mark.parametrize("after", [2, 4], ids=["warm-up", "under the clock"])
def test_who_raises_under_the_clock_costs_itself_alone(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(monkeypatch, **{EXITS_EXACT: raising(after)})
    assert (rows[EXITS_EXACT].gate, rows[EXITS_EXACT].median_ms) == (NOT_RUN, None)
    assert rows[EXITS_EXACT].problem == "not timed: OutOfMemoryError: CUDA out of memory."
    for name in (DENSE, MERGED_EXACT):
        assert (rows[name].gate, rows[name].rounds) == (PASSED, 2)
    assert rows[MERGED_EXACT].speedup == pytest.approx(rows[DENSE].median_ms / rows[MERGED_EXACT].median_ms)


def test_everybody_may_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(monkeypatch, **dict.fromkeys(NAMES, raising(2, ValueError("no"))))
    assert {row.problem for row in rows.values()} == {"not timed: ValueError: no"}


@pytest.mark.parametrize("scores", [True, False])
def test_who_raises_after_the_clock_costs_itself_alone(scores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time without a second verdict is none."""
    rows = measured(monkeypatch, **{MERGED_EXACT: raising(2 if scores else 5, scores=scores)})
    assert rows[MERGED_EXACT].problem == "not checked after the clock: OutOfMemoryError: CUDA out of memory."
    assert rows[MERGED_EXACT].median_ms is rows[MERGED_EXACT].speedup is None
    assert (rows[DENSE].gate, rows[EXITS_EXACT].gate) == (PASSED, PASSED)


def test_an_error_that_stays_with_the_device_is_in_the_row_of_who_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that asks the device works any more, not even what describes a comparison."""
    broken: list[str] = []
    real_build, real_blank = Contender.build, measure.blank_row

    def alive() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def blank(case: Any, one: Contender) -> ModelRow:
        alive()
        return real_blank(case, one)

    def build(one: Contender, case: Any) -> Built:
        broken.extend([one.name] if one.name == EXITS_EXACT else [])
        alive()
        return real_build(one, case)

    monkeypatch.setattr(Contender, "build", build)
    monkeypatch.setattr(measure, "blank_row", blank)
    rows = Bench(nano_settings(contenders=NAMES)).measure(nano_case(batch=1), float("inf"))
    assert [(row.contender, row.gate) for row in rows] == list(zip(NAMES, (PASSED, NOT_RUN, NOT_RUN), strict=True))
    assert rows[1].problem.startswith("RuntimeError: CUDA error: an illegal memory access")


@pytest.mark.parametrize("broken", ["synchronize", "empty_cache"])
def test_tidying_up_never_raises(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def call(name: str) -> None:
        called.append(name)
        if name == broken:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: call("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: call("empty_cache"))
    tidy(torch.device("cuda"))
    assert called[-1] == broken


def test_inputs_are_turned_back_when_a_check_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    case = nano_case()
    before = [images.clone() for images in case.inputs]
    bench = Bench(nano_settings(contenders=NAMES))
    real = Contender.build
    monkeypatch.setattr(Contender, "build", lambda one, case: raising(2, scores=True)(real(one, case)))
    assert {row.gate for row in bench.measure(case, float("inf"))} == {NOT_RUN}
    assert all(map(torch.equal, case.inputs, before))


def built(held: int = 0) -> Built:
    return Built(torch.zeros, torch.zeros, held_bytes=held)


def tried(ready: dict[str, Built], raiser: Callable[[dict[str, Built]], tuple[str, Exception] | None]) -> Any:
    """`without_who_raises` where the clock raises what `raiser` says: names at each try, and the result."""
    tries = []

    def clock() -> dict[str, Timings]:
        tries.append(list(ready))
        found = raiser(ready)
        if found is not None:
            raise Raised(found[0]) from found[1]
        return {name: Timings((1.0,)) for name in ready}

    return tries, without_who_raises(ready, clock, CPU)


def test_no_memory_for_the_baseline_costs_whoever_holds_the_most() -> None:
    ready = {DENSE: built(50), "graph": built(20), "graphs": built(30), "eager": built()}

    def full(ready: dict[str, Built]) -> tuple[str, Exception] | None:
        return (DENSE, FULL) if "graph" in ready else None

    tries, (timings, problems) = tried(ready, full)
    assert tries == [[DENSE, "graph", "graphs", "eager"], [DENSE, "graph", "eager"], [DENSE, "eager"]]
    assert list(timings) == list(ready) == [DENSE, "eager"]
    reason = "not timed: dense needed its memory: OutOfMemoryError: CUDA out of memory."
    assert problems == {"graphs": reason, "graph": reason}


def test_a_baseline_that_nobody_stands_in_the_way_of_goes_itself() -> None:
    tries, (timings, problems) = tried(
        {DENSE: built(9), "eager": built()}, lambda ready: (DENSE, FULL) if DENSE in ready else None
    )
    assert (len(tries), list(timings), list(problems)) == (2, ["eager"], [DENSE])
    _, (timings, problems) = tried(
        {DENSE: built(), "graph": built(5)}, lambda ready: (DENSE, ValueError()) if DENSE in ready else None
    )
    assert (list(timings), list(problems)) == (["graph"], [DENSE])  # not for lack of memory


def test_tries_are_never_more_than_contenders() -> None:
    ready = {name: built(1) for name in ("a", "b", "c")}
    tries, (timings, problems) = tried(ready, lambda ready: (next(reversed([*ready])), ValueError("CUDA error")))
    assert (len(tries), timings, list(problems)) == (3, {}, ["c", "b", "a"])
    tries, (timings, problems) = tried({"a": built(), "b": built()}, lambda ready: ("somebody else", ValueError("no")))
    assert (len(tries), timings) == (1, {})
    assert set(problems.values()) == {"not timed: somebody else: ValueError: no"}


def test_an_error_that_the_clock_reports_is_that_of_the_call_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run behind the host's back: what goes wrong in them shows when the clock waits."""
    bench, case = Bench(nano_settings(contenders=NAMES)), nano_case()
    calls: list[str] = []

    def clock() -> float:
        if calls[-1:] == ["second"]:
            raise RuntimeError("CUDA error: an illegal memory access")
        return 0.0

    bench.clock = clock
    ready = {name: Built(lambda number, name=name: calls.append(name), torch.zeros) for name in ("first", "second")}
    with pytest.raises(Raised) as caught:
        bench.time(case, ready, 1.0)
    assert caught.value.name == "second" and "illegal" in str(caught.value.__cause__)
    assert list(Watched(ready).calls) == ["first", "second"]


@pytest.mark.parametrize("both", [True, False])
def test_costs_that_cannot_be_measured_cost_no_time(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any, device: Any, *, held_bytes: int, profiled: bool) -> Any:
        if profiled or both:
            raise RuntimeError("the profiler is in use")
        return Costs(peak_memory_bytes=7), []

    monkeypatch.setattr(measure, "measure_costs", broken)
    row = measured(monkeypatch)[DENSE]
    assert (row.gate, row.rounds, row.speedup) == (PASSED, 2, 1.0)
    assert row.note.endswith(f"{NO_COSTS}: RuntimeError: the profiler is in use")
    assert row.note.startswith("not compiled: ")  # what was there before
    expected = {"peak_memory_bytes": None if both else 7, "host_syncs": None, "device_kernels": None}
    assert {name: getattr(row, name) for name in COST_FIELDS} == expected


def test_a_baseline_without_costs_is_still_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(monkeypatch)[DENSE]
    for note, compiled in ((None, True), (f"{NO_COSTS}: no", True), (f"no CUDA graph; {NO_COSTS}: no", False)):
        assert is_compiled(dataclasses.replace(row, compile_seconds=1.0, note=note)) == compiled
