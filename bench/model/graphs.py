"""CUDA graphs of contenders that have no `capture` of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from step_kernels.model import Trace
from step_kernels.model.graph.cuda_graph import CudaGraph, GraphPool

from ..timing import DeviceClock, interleave

Outputs = tuple[Tensor, ...]


class Replayed:
    """A function without arguments as a CUDA graph; each call overwrites the results of the one before.

    What it reads is written on the stream that it is called on.

    Args:
        function: launches the same work on the same tensors every time and never waits for the device.
        device: that it runs on.
        warm_up: how often the function runs before it is recorded, for all to compile.
        pool: to record into, shared with others; without one, the graph has a pool of its own.

    Attributes:
        seconds, memory_bytes: as of `CudaGraph`.
    """

    def __init__(
        self, function: Callable[[], Outputs], device: torch.device, *, warm_up: int = 2, pool: GraphPool | None = None
    ) -> None:
        run = torch.no_grad()(function)
        self._graph = CudaGraph(device, pool)
        for _ in range(warm_up):
            self._graph.warm_up(run, syncs=True)
        self._graph.warm_up(run, syncs=False)
        self._outputs = self._graph.record(run)
        self.seconds, self.memory_bytes = self._graph.seconds, self._graph.memory_bytes

    def __call__(self) -> Outputs:
        with self._graph.turn():
            self._graph.replay()
        return self._outputs


class Graphed:
    """A function of images as a CUDA graph; each call overwrites the results of the one before.

    Args:
        function: launches the same work every time and never waits for the device.
        images: an input; its contents are copied.
        warm_up: how often the function runs before it is recorded, for all to compile.

    Attributes:
        seconds, memory_bytes: as of `CudaGraph`, the images' own buffer included.
    """

    def __init__(self, function: Callable[[Tensor], Outputs], images: Tensor, warm_up: int = 2) -> None:
        self._images = images.clone()
        self._replay = Replayed(lambda: function(self._images), images.device, warm_up=warm_up)
        self.seconds, self.memory_bytes = self._replay.seconds, self._replay.memory_bytes + self._images.nbytes

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        self._images.copy_(images)
        return self._replay()


def largest_first(traces: Sequence[Trace]) -> list[int]:
    """Numbers of trimmed traces, in the order in which the graphs for them go into one pool: the memory of a larger one is cut up for
    those after it, while that of a smaller one is of no use to a larger one."""
    return sorted(range(len(traces)), key=lambda number: traces[number].layout.capacity, reverse=True)


def fastest(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 6) -> str:
    """The name of the call with the smallest median time in a short race."""
    if len(calls) == 1:
        return next(iter(calls))
    racers = {name: _of_any_input(call) for name, call in calls.items()}
    timings = interleave(racers, inputs=1, clock=DeviceClock(device), rounds=rounds)
    return min(timings, key=lambda name: timings[name].median)


def _of_any_input(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda number: call()
