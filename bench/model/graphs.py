"""CUDA graphs of any function, and of a segmenter at exactly the sizes that the host knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from step_kernels.model import Trace
from step_kernels.model.graph.cuda_graph import CudaGraph, GraphPool

from ..engine import Contender, NotRun
from ..segmenters import MERGED_EXITS, Segmenters


class Graphed:
    """A function that launches the same work on the same tensors every time as a CUDA graph; a call overwrites the results of the last.

    Its memory, `held_bytes`, is of `pool`, which other graphs may share, or of its own.

    Raises:
        NotRun: this is no GPU.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, pool: GraphPool | None = None) -> None:
        if device.type != "cuda":
            raise NotRun("needs a CUDA device")
        run = torch.no_grad()(function)
        self._graph = CudaGraph(device, pool)
        for syncs in (True, True, False):  # twice for all to compile
            self._graph.warm_up(run, syncs=syncs)
        self._results = self._graph.record(run)
        self.held_bytes = self._graph.memory_bytes

    def __call__(self) -> Any:
        with self._graph.turn():
            self._graph.replay()
        return self._results


def exact_size_graphs(own: Segmenters) -> Contender:
    """One graph for each input, at exactly its sizes: the least that static mode could take."""
    images, pool, graphs = own.inputs[0].clone(), GraphPool(), dict[int, Graphed]()
    for number in largest_first(own.traces):
        images.copy_(own.inputs[number])
        predict = functools.partial(own.repeating(MERGED_EXITS, own.traces[number]).predict, images)
        graphs[number] = Graphed(predict, own.device, pool)

    def labels(number: int) -> Any:
        images.copy_(own.inputs[number])
        return graphs[number]().clone()  # the graphs share their memory

    held = images.nbytes + sum(graph.held_bytes for graph in graphs.values())
    note = f"{len(graphs)} CUDA graphs, one for each input"
    return own.contender(MERGED_EXITS, labels, ours=True, note=note, held_bytes=held)


def largest_first(traces: Sequence[Trace]) -> list[int]:
    """The order in which graphs go into one pool: memory of a larger one is cut up for those after it, never the reverse."""
    return sorted(range(len(traces)), key=lambda number: traces[number].layout.capacity, reverse=True)
