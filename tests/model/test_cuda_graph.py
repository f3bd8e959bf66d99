"""`CudaGraph` around its recording, on stand-ins for what it asks of PyTorch: nothing here needs a GPU."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step_kernels.model.graph.cuda_graph import CudaGraph, sync_debug_mode

PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"


class DebugMode:
    """PyTorch's: the first change warns, after the mode was changed."""

    def __init__(self) -> None:
        self.mode, self.warned, self.seen = 0, False, list[int]()

    def set(self, mode: int | str) -> None:
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[arg-type, assignment]
        self.seen.append(self.mode)
        if not self.warned:
            self.warned = True
            warnings.warn(PROTOTYPE, UserWarning, stacklevel=2)


@pytest.fixture
def debug_mode(monkeypatch: pytest.MonkeyPatch) -> DebugMode:
    made = DebugMode()
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: made.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", made.set)
    return made


class Recording:
    """What `torch.cuda.graph` gives: whether it is under way."""

    def __init__(self) -> None:
        self.under_way = False

    @contextlib.contextmanager
    def __call__(self, graph: Any, **options: Any) -> Iterator[None]:
        self.under_way = True
        try:
            yield
        finally:
            self.under_way = False


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    made, nothing = Recording(), lambda *_: contextlib.nullcontext()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        **dict.fromkeys(("device", "stream", "synchronize", "empty_cache", "Event", "CUDAGraph"), nothing),
        **dict.fromkeys(("Stream", "current_stream"), lambda *_: stream),
        **{"memory_reserved": lambda: 0, "graph": made},
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return made


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("before", [0, 2])
def test_the_remark_that_the_mode_is_a_prototype_is_no_error(debug_mode: DebugMode, before: int) -> None:
    debug_mode.mode = before
    with sync_debug_mode("warn"):
        assert debug_mode.mode == 1
        with pytest.raises(UserWarning, match="of somebody else"):
            warnings.warn("of somebody else", UserWarning, stacklevel=2)
    assert debug_mode.mode == before and debug_mode.warned


def test_the_mode_comes_back_whatever_happens(debug_mode: DebugMode, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), sync_debug_mode("error"):
        raise ZeroDivisionError
    assert debug_mode.mode == 0
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_: None)  # as if PyTorch had said it in other words
    debug_mode.warned = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="prototype"), sync_debug_mode("error"):
            pass
    assert debug_mode.mode == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("recording")
def test_the_first_warm_up_of_a_process(debug_mode: DebugMode) -> None:
    graph = CudaGraph(torch.device("cpu"))
    assert graph.warm_up(lambda: debug_mode.mode, syncs=False) == 2
    assert graph.warm_up(lambda: debug_mode.mode, syncs=True) == 0
    with pytest.raises(ZeroDivisionError):
        graph.warm_up(lambda: 1 // 0, syncs=False)
    assert debug_mode.mode == 0


class Cycle:
    """Dropped, it is garbage that only Python's collector frees."""

    def __init__(self, freed: Callable[[], object]) -> None:
        self.itself = self
        weakref.finalize(self, freed).atexit = False


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Collects often, but not so often that what is being made is old when it is dropped."""
    before, enabled = gc.get_threshold(), gc.isenabled()
    gc.enable()
    gc.set_threshold(100, 10, 10)
    yield
    gc.set_threshold(*before)
    (gc.enable if enabled else gc.disable)()


@pytest.mark.usefixtures("eager_collector")
def test_no_finalizer_runs_inside_a_recording(recording: Recording) -> None:
    """One of a dropped capture waits for the device, which CUDA forbids there."""
    graph, freed = CudaGraph(torch.device("cpu")), dict[str, bool]()

    def drop(name: str) -> None:
        Cycle(lambda: freed.setdefault(name, recording.under_way))

    def run() -> list[Any]:
        assert recording.under_way
        drop("inside")
        return [[] for _ in range(10_000)]  # each a chance to collect

    gc.disable()
    drop("before")
    gc.enable()
    graph.record(run)
    gc.collect()
    assert freed == {"before": False, "inside": False}


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_afterwards_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        assert CudaGraph(torch.device("cpu")).record(gc.isenabled) is False
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError):
            CudaGraph(torch.device("cpu")).record(lambda: 1 // 0)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
