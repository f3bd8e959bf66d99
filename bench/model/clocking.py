"""Contenders timed together when one of them raises: it goes without a time, and the others are timed again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor

from ..kernels.contenders import in_one_line
from ..timing import Timings
from .registry import DENSE, Built


class Raised(Exception):
    """What a contender raised under the clock, which is the cause.

    Attributes:
        name: the contender's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Watched:
    """Calls that say who is running.

    Attributes:
        running: who was called last. A GPU reports what went wrong in a call when the clock waits for it, before the next call.
    """

    def __init__(self, ready: Mapping[str, Built]) -> None:
        self.running = next(iter(ready))
        self.calls = {name: self._watched(name, built.labels) for name, built in ready.items()}

    def _watched(self, name: str, labels: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        def call(number: int) -> Tensor:
            self.running = name
            return labels(number)

        return call


def without_who_raises(
    ready: MutableMapping[str, Built],
    clock: Callable[[], dict[str, Timings]],
    device: torch.device,
) -> tuple[dict[str, Timings], dict[str, str]]:
    """Times all that are ready; each try has one fewer of them, so there are never more tries than contenders.

    Args:
        ready: in the order of importance; who does not get a time is taken out, so that the memory that it holds is free.
        clock: times those that are left, and raises `Raised`.
        device: where they run.

    Returns:
        The timings, and for the others why there are none.
    """
    problems: dict[str, str] = {}
    while ready:
        try:
            return clock(), problems
        except Raised as raised:
            out, problem = _who_goes(raised, ready)
        for name in out:
            problems[name] = f"not timed: {problem}"
            del ready[name]
        tidy(device)
    return {}, problems


def _who_goes(raised: Raised, ready: Mapping[str, Built]) -> tuple[list[str], str]:
    """Names and the reason: who raised, or, when there is no memory for the baseline, who holds the most of it."""
    problem = in_one_line(raised.__cause__ if isinstance(raised.__cause__, Exception) else raised)
    if raised.name not in ready:  # somebody timed beside them
        return list(ready), f"{raised.name}: {problem}"
    others = [name for name in reversed([*ready]) if name != DENSE and ready[name].held_bytes]
    if raised.name == DENSE and isinstance(raised.__cause__, torch.OutOfMemoryError) and others:
        return [max(others, key=lambda name: ready[name].held_bytes)], f"dense needed its memory: {problem}"
    return [raised.name], problem


def tidy(device: torch.device) -> None:
    """Gives back what contenders held: compiled code, graphs and their memory.

    It never raises: a kernel's error stays with the device, and PyTorch frees nothing any more after a recording that broke off. Who
    is to blame has a row that says so, and whatever runs next shows what still works.
    """
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
