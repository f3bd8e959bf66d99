"""Interleaved timing: drift (heat, clocks, other users) falls on all contenders alike.

Rounds go A B C on input 0, C B A on input 1, and so on, over rotating inputs; what a call returns is freed after the clock was read.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FEWEST_PAIRS = 2
HEAD_START_FILLS = 4  # of the cache-sized buffer: more than half a millisecond of work in front of every call
Call = Callable[[int], Any]
Clock = Callable[[Call, int], tuple[float, Any]]  # times one call: milliseconds, and what it returned


@dataclass
class Timed:
    """One contender under the clock.

    Attributes:
        milliseconds: of every timed call.
        number, result: the last timed call's input and what it returned.
        problem: what it raised; it is left out of the rounds that follow.
    """

    milliseconds: list[float] = field(default_factory=list)
    number: int = 0
    result: Any = None
    problem: Exception | None = None


def wall_clock(device: torch.device) -> Clock:
    """With the host's work, as a user of a whole model waits for it; the device is waited for."""

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(call: Call, number: int) -> tuple[float, Any]:
        sync()
        before = time.perf_counter()
        result = call(number)
        sync()
        return (time.perf_counter() - before) * 1e3, result

    return measure


def device_clock(device: torch.device, cache_bytes: int = 512 * 2**20) -> Clock:
    """Time on the GPU alone: the queue is ahead, and the cache is cold, as between the layers of a model.

    A call that waits for the device still pays for it: its head start is used up by then.
    """
    if device.type != "cuda":
        return wall_clock(device)
    flush = torch.empty(cache_bytes, dtype=torch.uint8, device=device)

    def measure(call: Call, number: int) -> tuple[float, Any]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(HEAD_START_FILLS):
            flush.zero_()
        begin.record()
        result = call(number)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), result

    return measure


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    inputs: int,
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    prepare: Mapping[str, Callable[[int], None]] | None = None,
) -> dict[str, Timed]:
    """Times every contender in whole pairs of rounds: at least two, and at least one round for each input.

    Args:
        calls: name -> call, which gets the number of the input.
        clock: times one call.
        inputs: how many rotate.
        seconds: budget of the rounds; a pair that would overrun it is not begun.
        rounds: instead of a budget, how often each contender is timed, rounded up to whole pairs.
        prepare: name -> what comes before each call of it, not timed.
    """
    found = {name: Timed() for name in calls}

    def once(name: str, number: int, *, counted: bool) -> None:
        timed = found[name]
        if timed.problem is not None:
            return
        timed.result = None  # freed outside of the time
        try:
            if prepare is not None:
                prepare[name](number)
            milliseconds, timed.result = clock(calls[name], number)
        except Exception as error:  # the others go on
            timed.problem = error
            return
        timed.number = number
        if counted:
            timed.milliseconds.append(milliseconds)

    for name in calls:  # first calls allocate and load: never counted
        once(name, 0, counted=False)
    numbers, started = itertools.cycle(range(inputs)), time.perf_counter()
    for pair in itertools.count():
        if _enough(pair, inputs, time.perf_counter() - started, seconds, rounds):
            return found
        # The last one is not the first input, where there are several: who kept that one's answer would be right.
        pair_of_inputs = sorted((next(numbers), next(numbers)))
        for order, number in zip((list(calls), list(calls)[::-1]), pair_of_inputs, strict=True):
            for name in order:
                once(name, number, counted=True)
    raise AssertionError("unreachable: the rounds above end")


def _enough(pairs: int, inputs: int, spent: float, seconds: float, rounds: int | None) -> bool:
    if rounds is not None:
        return 2 * pairs >= rounds
    return pairs >= max(FEWEST_PAIRS, -(-inputs // 2)) and spent + spent / pairs > seconds
