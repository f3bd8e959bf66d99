"""Contenders take turns, so that drift falls on all of them alike."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import BreakableDevice, no_time

from bench.clock import FEWEST_PAIRS, HEAD_START_FILLS, Broken, device_clock, interleave, wall_clock

ROOT = Path(__file__).parents[2]


def turns(inputs: int, **options: Any) -> list[tuple[str, int]]:
    """Who was called on which input, the first uncounted calls left out."""
    called: list[tuple[str, int]] = []
    calls = {name: (lambda number, name=name: called.append((name, number))) for name in "ABC"}
    interleave(calls, no_time, inputs, **{"seconds": 0.0, **options})
    assert called[:3] == [("A", 0), ("B", 0), ("C", 0)]
    return called[3:]


def test_rounds_go_forth_and_back_over_rotating_inputs() -> None:
    assert turns(3) == [
        *[("A", 0), ("B", 0), ("C", 0), ("C", 1), ("B", 1), ("A", 1)],
        *[("A", 0), ("B", 0), ("C", 0), ("C", 2), ("B", 2), ("A", 2)],
    ]


@pytest.mark.parametrize("inputs", [2, 3, 4, 5])
@pytest.mark.parametrize("rounds", [4, 6, 8, 10])
def test_last_input_is_never_the_first_one(inputs: int, rounds: int) -> None:
    assert turns(inputs, rounds=rounds)[-1] != ("A", 0)


@pytest.mark.parametrize("inputs", [1, 3, 4, 5, 8])
def test_every_contender_sees_every_input_whatever_the_budget(inputs: int) -> None:
    for name in "ABC":
        assert {number for who, number in turns(inputs) if who == name} == set(range(inputs))


@pytest.mark.parametrize(("rounds", "timed"), [(1, 2), (2, 2), (3, 4), (10, 10)])
def test_rounds_are_rounded_up_to_whole_pairs(rounds: int, timed: int) -> None:
    assert len(turns(2, rounds=rounds)) == 3 * timed


def test_budget_is_not_overrun_by_a_pair() -> None:
    started = time.perf_counter()
    found = interleave({"sleeps": lambda number: time.sleep(0.01)}, no_time, 1, seconds=0.2)
    assert time.perf_counter() - started < 0.4
    assert 2 * FEWEST_PAIRS < len(found["sleeps"].milliseconds) <= 20


def test_last_result_is_kept_with_its_input() -> None:
    found = interleave({"A": lambda number: f"answer {number}"}, no_time, 3, seconds=0)
    assert (found["A"].number, found["A"].result) == (2, "answer 2")


def test_results_are_freed_before_the_next_call() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def call(number: int) -> torch.Tensor:
        assert not alive or alive[-1]() is None
        result = torch.ones(3)
        alive.append(weakref.ref(result))
        return result

    assert interleave({"A": call}, no_time, 2, seconds=0)["A"].problem is None


def test_who_raises_is_left_out_and_the_others_go_on() -> None:
    called: list[int] = []

    def tires(number: int) -> None:
        called.append(number)
        if len(called) == 3:
            raise RuntimeError("tired")

    found = interleave({"tires": tires, "goes on": lambda number: number}, no_time, 2, rounds=6)
    assert str(found["tires"].problem) == "tired" and len(called) == 3
    assert len(found["goes on"].milliseconds) == 6


def test_broken_preparation_is_a_problem_of_the_contender() -> None:
    def prepare(number: int) -> None:
        raise RuntimeError("no canvas")

    found = interleave({"A": lambda number: number}, no_time, 1, seconds=0, prepare={"A": prepare})
    assert str(found["A"].problem) == "no canvas"


def test_interrupt_goes_through() -> None:
    def call(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"A": call}, no_time, 1, seconds=0)


@pytest.mark.parametrize("clock", [wall_clock, device_clock])
def test_clocks_of_a_cpu_tell_the_time(clock: Any) -> None:
    milliseconds, result = clock(torch.device("cpu"))(lambda number: time.sleep(0.02) or number, 7)
    assert 20 <= milliseconds < 200 and result == 7


def test_the_device_clock_starts_behind_fills_that_are_written_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: fills for the head start, a pass that reads, so that the cache holds nothing to be written back, the call in its events."""
    seen: list[str] = []

    class Event:
        def __init__(self, **named: Any) -> None:
            self.record, self.synchronize = lambda: seen.append("event"), lambda: None

        def elapsed_time(self, end: Any) -> float:
            return 2.0

    class Buffer:
        def __getattr__(self, name: str) -> Any:
            return lambda: seen.append(name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **named: Buffer())
    clock = device_clock(torch.device("cuda"))
    assert clock(lambda number: seen.append("call") or number, 7) == (2.0, 7)
    assert seen == [*["zero_"] * HEAD_START_FILLS, "sum", "event", "call", "event"] and HEAD_START_FILLS >= 8


def test_who_breaks_the_device_ends_the_round_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device = BreakableDevice(monkeypatch)
    called: list[str] = []

    def call(name: str) -> Any:
        def run(number: int) -> int:
            called.append(name)
            device.answer()
            if name == "B" and called.count("B") == 2:
                device.break_down()
            return number

        return run

    with pytest.raises(Broken, match=r"^B$"):
        interleave({name: call(name) for name in "ABC"}, no_time, 2, rounds=6)
    assert called == [*"ABC", *"AB"]


FAULTS = """
import resource
import torch
from bench.clock import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(9 * 2**20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = sum(faults() > 10 for _ in range(10))
keep_freed_memory()
print(given_back, sum(faults() > 10 for _ in range(50)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_pages_of_freed_memory_are_kept_for_the_next_tensor() -> None:
    """Of tensors above the 32 MiB that glibc may keep, all are cleared by the kernel; then the first few, until there is room for alignment."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    given_back, kept = map(int, run.stdout.split())
    assert given_back == 10
    assert kept < 20
