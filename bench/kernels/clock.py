"""Device time on a GPU: CUDA events around one call, behind work that gives the host a head start.

Inside a model the queue is ahead of the GPU, and in a CUDA graph there is no host at all, so the time to launch a kernel is
not the kernel's. A contender that waits for the device while it works (a host sync) still pays for that: the head start is
used up by then. The work in front overwrites a buffer larger than the cache: every call finds its inputs in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

HEAD_START_FILLS = 4  # of half a gigabyte: more than half a millisecond on the fastest memory there is today


class Event(Protocol):
    """What the clock uses of torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float: ...


class Moment:
    """A point between two calls: when the device had done the earlier one, and when it was free for the next."""

    def __init__(self, ended: Event, free: Event) -> None:
        self._ended, self._free = ended, free

    def __sub__(self, earlier: Moment) -> float:
        """Seconds on the device from when it was free at the earlier moment to its last work before this one."""
        self._ended.synchronize()
        return earlier._free.elapsed_time(self._ended) / 1000


class DeviceTimeline:
    """A clock for `bench.timing.interleave`, which only ever subtracts what it reads.

    Args:
        occupy: launches the work in front of the next call.
        event: makes an event of the current stream.
    """

    def __init__(self, occupy: Callable[[], object], event: Callable[[], Event]) -> None:
        self._occupy, self._event = occupy, event

    def __call__(self) -> Moment:
        ended, free = self._event(), self._event()
        ended.record()
        self._occupy()
        free.record()
        return Moment(ended, free)


def device_timeline(buffer: Tensor) -> DeviceTimeline:
    """The clock of the current CUDA device; `buffer` is overwritten again and again."""

    def occupy() -> None:
        for _ in range(HEAD_START_FILLS):
            buffer.zero_()

    return DeviceTimeline(occupy, lambda: torch.cuda.Event(enable_timing=True))
