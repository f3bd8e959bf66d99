"""Interleaved timing: drift (heat, clocks, other users) falls on all contenders alike.

Rounds go A B C on input 0, C B A on input 1, and so on, over rotating inputs; what a call returns is freed after the clock was read.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FEWEST_PAIRS = 2
# Of a buffer larger than the cache, in front of every call: about a millisecond, as to launch attention forward and backward takes 0.7.
HEAD_START_FILLS = 8
Call = Callable[[int], Any]
Clock = Callable[[Call, int], tuple[float, Any]]  # times one call: milliseconds, and what it returned


class Broken(Exception):
    """The device answers nobody in this process any more; the argument is the contender that ran last."""


def broken() -> bool:
    """To be asked after an error: whether it was one that a CUDA context does not survive, such as an illegal access."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


@dataclass
class Timed:
    """One contender under the clock: its times, the last call's input and result, and what it raised, after which it is left out."""

    milliseconds: list[float] = field(default_factory=list)
    number: int = 0
    result: Any = None
    problem: Exception | None = None


def wall_clock(device: torch.device) -> Clock:
    """With the host's work, as a user of a whole model waits for it; the device is waited for."""

    sync = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def measure(call: Call, number: int) -> tuple[float, Any]:
        sync()
        before = time.perf_counter()
        result = call(number)
        sync()
        return (time.perf_counter() - before) * 1e3, result

    return measure


def keep_freed_memory() -> None:
    """Freed memory stays with this process, for all contenders alike.

    glibc gives large blocks back to the system or keeps them, as sizes and order have it. The kernel clears pages that come back: a dense
    forward on a CPU waits for many of them in one process, and for none in the next.
    """
    if platform.libc_ver()[0] == "glibc":
        for threshold in (-3, -1):  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(threshold, 2**31 - 1)


def device_clock(device: torch.device, cache_bytes: int = 512 * 2**20) -> Clock:
    """Time on the GPU alone: the queue is ahead, and the cache is cold, as between the layers of a model.

    A call that waits for the device still pays for it: its head start is used up by then.
    """
    if device.type != "cuda":
        return wall_clock(device)
    flush = torch.empty(cache_bytes // 4, dtype=torch.int32, device=device)

    def measure(call: Call, number: int) -> tuple[float, Any]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(HEAD_START_FILLS):
            flush.zero_()
        flush.sum()  # what the fills have left in the cache is written back here, and not in the time of the call
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
    prepare: Mapping[str, Callable[[int], None]] | None = None,
    seconds: float = 1.0,
    rounds: int | None = None,
) -> dict[str, Timed]:
    """Times every contender in whole pairs of rounds: at least two, and at least one round for each input. `Broken` where one breaks the device.

    Args:
        calls: name -> call, which gets the number of the input.
        clock: times one call.
        inputs: how many rotate.
        prepare: name -> what comes before each call of it, not timed.
        seconds: budget of the rounds; a pair that would overrun it is not begun.
        rounds: instead of a budget, how often each contender is timed, rounded up to whole pairs.
    """
    found = {name: Timed() for name in calls}

    def once(name: str, number: int, *, counted: bool) -> None:
        timed = found[name]
        timed.result = None  # freed outside of the time
        try:
            if timed.problem is None:
                if prepare is not None:
                    prepare[name](number)
                milliseconds, timed.result = clock(calls[name], number)
                timed.milliseconds += [milliseconds] * counted
                timed.number = number
        except Exception as error:  # the others go on
            timed.problem = error
            if broken():
                raise Broken(name) from error

    for name in calls:  # first calls allocate and load: never counted
        once(name, 0, counted=False)
    numbers, started = itertools.cycle(range(inputs)), time.perf_counter()
    fewest = max(FEWEST_PAIRS, -(-inputs // 2)) if rounds is None else -(-rounds // 2)
    for pairs in itertools.count():
        spent = time.perf_counter() - started
        if pairs >= fewest and (rounds is not None or spent + spent / pairs > seconds):
            break
        # The last one is not the first input, where there are several: who kept that one's answer would be right.
        pair_of_inputs = sorted((next(numbers), next(numbers)))
        for order, number in zip((list(calls), list(calls)[::-1]), pair_of_inputs, strict=True):
            for name in order:
                once(name, number, counted=True)
    return found
