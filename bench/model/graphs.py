"""CUDA graphs: of any function, of a segmenter in static mode, and of one at exactly the sizes that the host knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from step_kernels import Halting, SupertokenLayout
from step_kernels.model import LinearExit, Stage, StepEncoder, StepSegmenter, Trace, ViT
from step_kernels.model.graph.cuda_graph import CudaGraph, GraphPool

from ..engine import Contender, NotRun
from ..segmenters import MERGED, MERGED_EXITS, Given, Segmenters


class Graphed:
    """A function without arguments as a CUDA graph; each call overwrites the results of the one before.

    Args:
        function: launches the same work on the same tensors every time and never waits for the device.
        device: that it runs on.
        pool: of the memory that it shares with other graphs; without one, it has its own.

    Attributes:
        held_bytes: device memory that it keeps.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, pool: GraphPool | None = None) -> None:
        need_cuda(device)
        run = torch.no_grad()(function)
        self._graph = CudaGraph(device, pool)
        for _ in range(2):  # for all to compile
            self._graph.warm_up(run, syncs=True)
        self._graph.warm_up(run, syncs=False)
        self._results = self._graph.record(run)
        self.held_bytes = self._graph.memory_bytes

    def __call__(self) -> Any:
        with self._graph.turn():
            self._graph.replay()
        return self._results


class KnownExit(LinearExit):
    """An exit with the parameters of `head` that works as in a free run and then halts whom it is told.

    Where the survivors' layout is trimmed, the host knows it, and nothing waits for the device.
    """

    def __init__(self, head: LinearExit, stage: Stage) -> None:
        super().__init__(head.dim, head.num_classes, keep_per_class=head.keep_per_class)
        self.norm, self.head, self.threshold = head.norm, head.head, head.threshold
        self.stage = stage

    def halt(
        self, tokens: Tensor, layout: SupertokenLayout, *, canvas: Tensor, halted: Tensor | None = None
    ) -> Halting:
        halting = super().halt(tokens, layout, canvas=canvas, halted=self.stage.halted)
        known = self.stage.layout
        return (
            dataclasses.replace(halting, layout=known, rows=halting.rows[: known.capacity])
            if known.trimmed
            else halting
        )


def recorded_model(segmenters: Segmenters, family: str, trace: Trace, vit: ViT | None = None) -> StepSegmenter:
    """A model that does the work of a free run, the policy's too, and takes these decisions, whose tensors it reads where they are."""
    weights = segmenters.weights
    asked = weights.policy if family in (MERGED, MERGED_EXITS) else None
    exits = {stage.block: KnownExit(weights.exits[stage.block], stage) for stage in trace.stages}
    return StepSegmenter(StepEncoder(vit or weights.vit, Given(trace.layout, asked), exits), weights.decoder).eval()


def static_graph(segmenters: Segmenters, family: str, vit: ViT | None = None) -> Contender:
    """`StepSegmenter.capture`, recorded on the first input and replayed on all.

    Raises:
        NotRun: this is no GPU.
    """
    need_cuda(segmenters.device)
    decisions = [trace.untrim().tensors() for trace in segmenters.decisions(family)]
    held = segmenters.decisions(family)[0].untrim().clone()
    captured = recorded_model(segmenters, family, held, vit).capture(segmenters.inputs[0])

    def labels(number: int) -> Tensor:
        torch._foreach_copy_(held.tensors(), decisions[number])
        return captured.predict(segmenters.inputs[number])

    return segmenters.contender(family, labels, ours=vit is None, note="CUDA graph", held_bytes=captured.memory_bytes)


def exact_size_graphs(segmenters: Segmenters) -> Contender:
    """One graph for each input, at exactly its sizes: the least that static mode could take.

    Raises:
        NotRun: this is no GPU.
    """
    need_cuda(segmenters.device)
    images, pool, traces = segmenters.inputs[0].clone(), GraphPool(), segmenters.decisions(MERGED_EXITS)
    graphs = {}
    for number in largest_first(traces):
        model = recorded_model(segmenters, MERGED_EXITS, traces[number])
        images.copy_(segmenters.inputs[number])
        graphs[number] = Graphed(lambda model=model: model.predict(images), segmenters.device, pool)  # type: ignore[misc]

    def labels(number: int) -> Tensor:
        images.copy_(segmenters.inputs[number])
        result: Tensor = graphs[number]()
        return result.clone()  # the graphs share their memory

    held = images.nbytes + sum(graph.held_bytes for graph in graphs.values())
    note = f"{len(graphs)} CUDA graphs, one for each input"
    return segmenters.contender(MERGED_EXITS, labels, ours=True, note=note, held_bytes=held)


def largest_first(traces: Sequence[Trace]) -> list[int]:
    """The order in which graphs go into one pool: memory of a larger one is cut up for those after it, never the reverse."""
    return sorted(range(len(traces)), key=lambda number: traces[number].layout.capacity, reverse=True)


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotRun("needs a CUDA device")
