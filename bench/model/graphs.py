"""CUDA graphs of any function, and of a segmenter at exactly the sizes that the host knows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from step_kernels.model import Trace
from step_kernels.model.graph.cuda_graph import CudaGraph

from ..engine import Contender, NotRun
from ..segmenters import MERGED_EXITS, Segmenters


class Graphed:
    """A function that launches the same work every time as a CUDA graph (NotRun without a GPU); a call overwrites the results of the one before.

    A call copies its arguments into the first rows of `tensors`, which the function reads. The graph adds `held_bytes` to the memory of
    the one `beside` it, which it shares; see `CudaGraph`.
    """

    def __init__(self, function: Callable[[], Any], *tensors: Tensor, beside: Graphed | None = None) -> None:
        if tensors[0].device.type != "cuda":
            raise NotRun("needs a CUDA device")
        run, self._tensors = torch.no_grad()(function), tensors
        self._graph: CudaGraph = CudaGraph(tensors[0].device, None if beside is None else beside._graph)
        for syncs in (True, True, False):  # twice for all to compile
            self._graph.warm_up(run, syncs=syncs)
        self._results = self._graph.record(run)
        self.held_bytes = self._graph.memory_bytes

    def __call__(self, *values: Tensor) -> Any:
        into = [tensor[: value.shape[0]] for tensor, value in zip(self._tensors, values, strict=True)]
        with self._graph.turn():
            torch._foreach_copy_(into, values)
            self._graph.replay()
        return self._results


def exact_size_graphs(own: Segmenters) -> Contender:
    """One graph for each input, at exactly its sizes: the least that static mode could take."""
    images, graphs = own.inputs[0].clone(), dict[int, Graphed]()
    for number in largest_first(own.traces):
        images.copy_(own.inputs[number])
        predict = functools.partial(own.repeating(MERGED_EXITS, own.traces[number]).predict, images)
        graphs[number] = Graphed(predict, images, beside=next(iter(graphs.values()), None))

    def labels(number: int) -> Tensor:
        return graphs[number](own.inputs[number]).clone()  # the graphs share their memory

    held, note = images.nbytes + sum(graph.held_bytes for graph in graphs.values()), f"{len(graphs)} CUDA graphs"
    return own.contender(MERGED_EXITS, labels, ours=True, note=f"{note}, one for each input", held_bytes=held)


def largest_first(traces: Sequence[Trace]) -> list[int]:
    """The order in which graphs go into one pool: memory of a larger one is cut up for those after it, never the reverse."""
    return sorted(range(len(traces)), key=lambda number: traces[number].layout.capacity, reverse=True)
