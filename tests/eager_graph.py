"""An eager stand-in for `CudaGraph`, for tests of captures without a GPU: it runs the recorded function on the same buffers."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from small_models import photographs, small_segmenter
from torch import Tensor

from step_kernels.model import StepSegmenter
from step_kernels.model.graph import capture

SIZE = (61, 72)


class EagerGraph:
    """The interface of `CudaGraph`; a replay runs the recorded function and writes the recorded results."""

    made: ClassVar[list[EagerGraph]] = []

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.memory_bytes, self.busy = 0.5, 1000, False
        self.calls: list[str] = []
        EagerGraph.made.append(self)

    def warm_up(self, run: Callable[[], Any], *, syncs: bool) -> Any:
        self.calls.append("warm up" if syncs else "warm up without syncs")
        return run()

    def record(self, run: Callable[[], Any]) -> Any:
        self.calls.append("record")
        self.run, self.results = frozen(run), run()
        labels, trace = self.results
        for result in [labels, *trace.tensors()]:
            result.fill_(1)  # a recording runs nothing
        return self.results

    def wait(self) -> None:
        self.calls.append("wait")

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        assert not self.busy, "two calls at a time on one set of buffers"
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def replay(self) -> None:
        assert self.busy
        self.calls.append("replay")
        (labels, trace), (new_labels, new_trace) = self.results, self.run()
        for old, new in zip([labels, *trace.tensors()], [new_labels, *new_trace.tensors()], strict=True):
            assert old.shape == new.shape, "the size of a result depends on the images"
            old.copy_(new)


def frozen(run: functools.partial[Any]) -> Callable[[], Any]:
    """``run`` on the modules as they are now, whose tensors it shares: a graph does not see a module that is replaced."""
    method = run.func
    runner = method.__self__
    memo = {id(tensor): tensor for tensor in (*runner.parameters(), *runner.buffers())}
    again = method.__func__.__get__(copy.deepcopy(runner, memo))
    return functools.partial(again, *run.args, **run.keywords)


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    EagerGraph.made = []
    monkeypatch.setattr(capture, "CudaGraph", EagerGraph)
    monkeypatch.setattr(capture, "refuse_unless_capturable", lambda images: None)
    yield


def case(
    head: str | None = "linear", decoder: str = "linear", batch_size: int = 3, **options: Any
) -> tuple[StepSegmenter, Tensor]:
    return small_segmenter(head, decoder, **options), photographs(batch_size, *SIZE)
