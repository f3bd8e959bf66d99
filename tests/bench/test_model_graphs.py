"""Graphs that share a memory pool: whose it is, what it holds, and that no result is lost to the next replay."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_model_cases import CPU, contender, eager_graphs, nano_case, nano_preset, tensors
from torch import Tensor

from bench.model import graphs
from bench.model.graphs import Graphed, Replayed
from bench.model.registry import EXACT_GRAPH, EXITS_EXACT
from step_kernels.model.graph import cuda_graph
from step_kernels.model.graph.cuda_graph import CudaGraph, GraphPool


@pytest.fixture(autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, graph: Callable[..., Any]) -> list[str]:
    """As much of CUDA as a recording touches, `graph` in the place of `torch.cuda.graph`; the name of the current stream."""
    current = ["the caller's"]

    @contextlib.contextmanager
    def stream(name: str) -> Iterator[None]:
        before, current[0] = current[0], name
        try:
            yield
        finally:
            current[0] = before

    for name in ("CUDAGraph", "Event"):
        monkeypatch.setattr(torch.cuda, name, object)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(cuda_graph, "recording_stream", lambda device: "the recording's")
    return current


def test_graphs_of_a_pool_are_recorded_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[Any] = []
    handles = iter([(0, 1), (0, 2)])

    def graph(recorded: Any, *, pool: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        pools.append(pool)
        return contextlib.nullcontext()

    pretend_cuda(monkeypatch, graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    pool, other = GraphPool(), GraphPool()
    for shared in (pool, other, None, pool):
        assert CudaGraph(CPU, shared).record(lambda: "results") == "results"
    assert pools == [(0, 1), (0, 2), None, (0, 1)]


def test_a_recording_that_breaks_off_leaves_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch itself goes back to it only when it could end the recording."""

    @contextlib.contextmanager
    def graph(recorded: Any, *, stream: str, **options: Any) -> Iterator[None]:
        current[0] = stream
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    current = pretend_cuda(monkeypatch, graph)
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="during capture"):
        CudaGraph(CPU).record(lambda: seen.append(current[0]))
    assert (seen, current) == (["the recording's"], ["the caller's"])


def test_a_pool_is_given_on_and_no_pool_is_one_of_its_own() -> None:
    with eager_graphs():
        pool, x = GraphPool(), torch.ones(3)
        first, second = (Replayed(lambda add=add: (x + add,), CPU, pool=pool) for add in (1.0, 2.0))
        own = Replayed(lambda: (x + 3.0,), CPU)
        assert [one()[0].tolist() for one in (first, own, second)] == [[2.0] * 3, [4.0] * 3, [3.0] * 3]
        kept, other = first()[0], own()[0]
        second()
        assert kept.isnan().all() and other.tolist() == [4.0] * 3  # what the stand-in is for
        graph = Graphed(lambda images: (images * 2,), x)
        assert graph(x * 5)[0].tolist() == [10.0] * 3 and x.tolist() == [1.0] * 3
        assert graph.memory_bytes == 1000 + 12 and graph.seconds == first.seconds == 0.5


def test_graphs_at_exact_sizes_share_memory_and_give_away_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, numbers = set(), []
    real = graphs.Replayed.__init__

    def init(one: Replayed, function: functools.partial[Any], *arguments: Any, **options: Any) -> None:
        pools.add(options.get("pool"))
        (images,) = function.args
        numbers.append(next(n for n, own in enumerate(case.inputs) if torch.equal(own, images)))
        real(one, function, *arguments, **options)

    monkeypatch.setattr(graphs.Replayed, "__init__", init)
    case = nano_case(batch=3)
    sizes = [trace.layout.capacity for trace in case.traces]
    before = [images.clone() for images in case.inputs]
    honest = contender(EXITS_EXACT).build(case)
    with eager_graphs():
        built = contender(EXACT_GRAPH).build(case)
        found = [(built.scores(number), built.labels(number)) for number in range(len(case.inputs))]
        found = [*map(tensors, found)]
    assert len(pools) == 1 and None not in pools
    recorded = [sizes[number] for number in numbers]
    assert recorded == sorted(sizes, reverse=True) != sizes
    for number, (scores, labels) in enumerate(found):
        torch.testing.assert_close(scores, honest.scores(number), atol=1e-5, rtol=0)
        assert torch.equal(labels, honest.labels(number))
    assert all(map(torch.equal, case.inputs, before))
    assert built.held_bytes == 3 * 1000 + nbytes(case.inputs[0])
    assert (built.variant, built.compile_seconds) == ("3 CUDA graphs", 1.5)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
