"""CUDA graphs of contenders that have no `capture` of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from step_kernels.model.cuda_graph import CudaGraph

from ..timing import DeviceClock, interleave

Outputs = tuple[Tensor, ...]


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
        self._graph = CudaGraph(images.device)
        for _ in range(warm_up):
            self._graph.warm_up(self._run(function), syncs=True)
        self._graph.warm_up(self._run(function), syncs=False)
        self._outputs = self._graph.record(self._run(function))
        self.seconds = self._graph.seconds
        self.memory_bytes = self._graph.memory_bytes + self._images.nbytes

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        with self._graph.turn():
            self._images.copy_(images)
            self._graph.replay()
        return self._outputs

    def _run(self, function: Callable[[Tensor], Outputs]) -> Callable[[], Outputs]:
        @torch.no_grad()
        def run() -> Outputs:
            return function(self._images)

        return run


def fastest(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int = 6) -> str:
    """The name of the call with the smallest median time in a short race."""
    if len(calls) == 1:
        return next(iter(calls))
    racers = {name: _of_any_input(call) for name, call in calls.items()}
    timings = interleave(racers, inputs=1, clock=DeviceClock(device), rounds=rounds)
    return min(timings, key=lambda name: timings[name].median)


def _of_any_input(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda number: call()
