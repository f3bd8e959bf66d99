"""Timing several contenders in one process so that drift (heat, clocks, other users) falls on all of them alike.

Rounds go A B C, then C B A, and so on: over a pair of rounds every contender has the same mean position. Each round has
one input, and the next round another one: all contenders see the same inputs equally often, however few the rounds are, and an
answer kept from the round before would answer another question.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

FEWEST_PAIRS = 2


class Clock(Protocol):
    """Seconds now, after everything launched before has ended."""

    def __call__(self) -> float: ...


class DeviceClock:
    """Wall time with the host's work included: on a GPU, waits for it before reading `time.perf_counter`.

    CUDA events would leave out what the host does before the first kernel; a user of eager code waits for that too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class Timings:
    """Milliseconds of every timed call of one contender."""

    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return percentile(self.milliseconds, 50)

    @property
    def p20(self) -> float:
        return percentile(self.milliseconds, 20)

    @property
    def p80(self) -> float:
        return percentile(self.milliseconds, 80)

    def fields(self) -> dict[str, Any]:
        """As a row of any job has them: "rounds", "median_ms", "p20_ms", "p80_ms"."""
        return {"rounds": len(self.milliseconds), "median_ms": self.median, "p20_ms": self.p20, "p80_ms": self.p80}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def schedule(names: Sequence[str], inputs: int) -> Iterator[list[tuple[str, int]]]:
    """Endless pairs of rounds as lists of (contender, input): A B C on input 0, C B A on input 1, and so on."""
    numbers = itertools.cycle(range(inputs))
    while True:
        forth, back = next(numbers), next(numbers)
        yield [*((name, forth) for name in names), *((name, back) for name in reversed(names))]


def interleave(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    inputs: int,
    clock: Clock,
    seconds: float | None = None,
    rounds: int | None = None,
    advance: Callable[[str], None] = lambda name: None,
    renew: Callable[[int], object] = lambda number: None,
    keep: Callable[[str, int, Any], object] = lambda name, number, output: None,
) -> dict[str, Timings]:
    """Times every contender, interleaved, after one call of each that is not timed.

    Args:
        contenders: name -> call; the call gets the number of the input, and what it returns is handed to `keep` and dropped
            after the clock has been read (so that freeing it is not timed).
        inputs: how many inputs rotate.
        clock: seconds, with a device waited for; see `DeviceClock`.
        seconds: budget for the timed calls, warm-up not counted; at least two pairs of rounds run whatever it says, and
            as many as every input needs for one round; only whole pairs run.
        rounds: instead of a budget, how often each contender is timed, rounded up to whole pairs.
        advance: called after every timed call.
        renew: called with the number of the input before every timed call, outside of the time: writes the input anew, so that
            an answer kept for its address and version is one for another version.
        keep: called after every timed call, outside of the time, with the name, the number of the input, and what came out.

    Returns:
        name -> `Timings`, all with the same number of calls.

    Raises:
        ValueError: neither or both of `seconds` and `rounds`.
    """
    if (seconds is None) == (rounds is None):
        raise ValueError(f"expected exactly one of seconds and rounds, got seconds={seconds} and rounds={rounds}")
    names = list(contenders)
    for name in names:
        contenders[name](0)
    measured: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    for done, pair in enumerate(schedule(names, inputs)):
        if rounds is not None:
            enough = 2 * done >= rounds
        else:
            # A pair as long as the average one so far must still fit, so that a budget is not overrun by a whole pair.
            spent = clock() - started
            enough = done >= max(FEWEST_PAIRS, math.ceil(inputs / 2)) and spent + spent / done > (seconds or 0.0)
        if enough:
            break
        for name, number in pair:
            renew(number)
            before = clock()
            output = contenders[name](number)
            measured[name].append((clock() - before) * 1000)
            keep(name, number, output)
            del output
            advance(name)
    return {name: Timings(tuple(values)) for name, values in measured.items()}
