"""The interleaver: order, rotation of inputs, budget and statistics, on a clock that the tests move."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from bench.timing import Timings, interleave, percentile, schedule


class FakeClock:
    """Seconds that only pass when a contender runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Workers:
    """Contenders that take a known time and log their calls."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.clock = FakeClock()
        self.calls: list[tuple[str, int]] = []
        self.contenders = {name: self._worker(name, cost) for name, cost in seconds.items()}

    def _worker(self, name: str, cost: float) -> Callable[[int], None]:
        def work(number: int) -> None:
            self.calls.append((name, number))
            self.clock.now += cost

        return work

    @property
    def timed_calls(self) -> list[tuple[str, int]]:
        """The calls after the one call of each that is not timed."""
        return self.calls[len(self.contenders) :]


def test_rounds_go_forth_and_back_and_inputs_rotate() -> None:
    workers = Workers({"a": 1.0, "b": 2.0, "c": 3.0})
    interleave(workers.contenders, inputs=3, clock=workers.clock, rounds=4)
    names = [name for name, _ in workers.timed_calls]
    numbers = [number for _, number in workers.timed_calls]
    assert names == list("abccba" * 2)
    assert numbers == [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3


@pytest.mark.parametrize("rounds", [1, 2, 6, 8, 20])
def test_contenders_see_the_same_inputs_however_few_the_rounds(rounds: int) -> None:
    workers = Workers({"a": 1.0, "b": 2.0, "c": 3.0})
    interleave(workers.contenders, inputs=8, clock=workers.clock, rounds=rounds)
    seen = {name: [number for other, number in workers.timed_calls if other == name] for name in "abc"}
    assert seen["a"] == seen["b"] == seen["c"]
    assert len(set(seen["a"])) == min(8, rounds + rounds % 2)  # and none again before every other one


def test_every_contender_runs_once_before_the_first_timed_call() -> None:
    workers = Workers({"a": 1.0, "b": 1.0})
    timings = interleave(workers.contenders, inputs=3, clock=workers.clock, rounds=2)
    assert workers.calls[:2] == [("a", 0), ("b", 0)]
    assert len(workers.calls) == 2 + sum(len(timing.milliseconds) for timing in timings.values())


def test_mean_position_is_the_same_for_all() -> None:
    pair = next(schedule(["a", "b", "c", "d"], inputs=1))
    positions = {name: [place for place, (other, _) in enumerate(pair) if other == name] for name in "abcd"}
    assert {sum(places) for places in positions.values()} == {7}


def test_times_are_attributed_to_the_contender_that_ran() -> None:
    workers = Workers({"fast": 0.25, "slow": 2.0})
    timings = interleave(workers.contenders, inputs=1, clock=workers.clock, rounds=6)
    assert timings["fast"].milliseconds == (250.0,) * 6
    assert timings["slow"].median == 2000.0


def test_odd_rounds_are_rounded_up_to_pairs() -> None:
    workers = Workers({"a": 1.0})
    assert len(interleave(workers.contenders, inputs=1, clock=workers.clock, rounds=3)["a"].milliseconds) == 4


def test_budget_holds_and_no_pair_is_cut_short() -> None:
    workers = Workers({"a": 1.0, "b": 2.0})
    timings = interleave(workers.contenders, inputs=1, clock=workers.clock, seconds=25.0)
    # A pair takes six seconds: four fit into 25 seconds, a fifth would overrun.
    assert len(timings["a"].milliseconds) == len(timings["b"].milliseconds) == 8


@pytest.mark.parametrize(("inputs", "calls"), [(1, 4), (5, 6), (8, 8)])
def test_tiny_budget_still_gives_two_pairs_and_every_input(inputs: int, calls: int) -> None:
    workers = Workers({"a": 100.0})
    timings = interleave(workers.contenders, inputs=inputs, clock=workers.clock, seconds=1.0)
    assert len(timings["a"].milliseconds) == calls
    assert {number for _, number in workers.timed_calls} == set(range(inputs))


@pytest.mark.parametrize("budget", [{}, {"seconds": 1.0, "rounds": 2}])
def test_budget_is_either_seconds_or_rounds(budget: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of seconds and rounds"):
        interleave({}, inputs=1, clock=FakeClock(), **budget)


def test_inputs_are_renewed_before_every_timed_call() -> None:
    """An answer kept for an input's address and version is never right for the version that the clock sees."""
    tensors, hits = [torch.zeros(3), torch.ones(3)], []
    kept: dict[tuple[int, int], bool] = {}

    def cheat(number: int) -> None:
        key = tensors[number].data_ptr(), tensors[number]._version
        hits.append(kept.get(key, False))
        kept[key] = True

    interleave({"cheat": cheat}, inputs=2, clock=FakeClock(), rounds=8, renew=lambda number: tensors[number].mul_(1))
    assert len(hits) == 9 and not any(hits)


def test_what_comes_out_of_a_timed_call_is_handed_over_after_the_clock() -> None:
    clock, kept = FakeClock(), []

    def keep(name: str, number: int, output: object) -> None:
        clock.now += 100.0
        kept.append((name, number, output))

    timings = interleave({"a": lambda number: -number}, inputs=2, clock=clock, rounds=2, keep=keep)
    assert kept == [("a", 0, 0), ("a", 1, -1)]
    assert timings["a"].milliseconds == (0.0, 0.0)


def test_advance_is_told_every_timed_call() -> None:
    workers = Workers({"a": 1.0, "b": 1.0})
    told: list[str] = []
    interleave(workers.contenders, inputs=1, clock=workers.clock, rounds=2, advance=told.append)
    assert told == list("abba")


def test_percentiles_interpolate_between_ranks() -> None:
    values = (5.0, 1.0, 3.0, 2.0, 4.0)
    assert [percentile(values, percent) for percent in (0, 20, 50, 80, 100)] == [1.0, 1.8, 3.0, 4.2, 5.0]
    assert percentile((7.0,), 80) == 7.0
    timings = Timings(values)
    assert (timings.p20, timings.median, timings.p80) == (1.8, 3.0, 4.2)


def test_schedule_never_ends() -> None:
    assert len(list(itertools.islice(schedule(["a"], inputs=2), 100))) == 100
