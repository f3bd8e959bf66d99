"""Streams, events and CUDA graphs. Work is done at once, so that streams order nothing; a graph holds calls, and a replay repeats them.

As on a GPU, a recording runs nothing: when it ends, what it wrote is undone, and its own memory is filled with NaN until the first replay.
Forks of a recording onto other streams, and memory that is used twice in a pool, have no counterpart here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import marks

DEVICE = torch.device("cuda", 0)
_local = threading.local()
_recordings: list[CUDAGraph] = []


def recording() -> CUDAGraph | None:
    """The graph that this thread records."""
    return getattr(_local, "graph", None)


def refuse_wait(what: str, *, whole_device: bool = False) -> None:
    """Waiting breaks the recording of this thread; of every thread where it is for the whole device, or the recording's mode global."""
    for graph in list(_recordings):
        if whole_device or graph is recording() or graph.error_mode == "global":
            graph.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.device_index = DEVICE, 0
        self.cuda_stream = self.stream_id = id(self)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        refuse_wait("a stream")

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.seconds = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        refuse_wait("an event")

    def elapsed_time(self, end: Event) -> float:
        if not (self.timed and end.timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return (end.seconds - self.seconds) * 1e3


DEFAULT_STREAM = Stream()


def current_stream(device: Any = None) -> Stream:
    return getattr(_local, "stream", DEFAULT_STREAM)


@contextlib.contextmanager
def stream(other: Stream | None) -> Iterator[None]:
    before, _local.stream = current_stream(), other or current_stream()
    try:
        yield
    finally:
        _local.stream = before


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Callable[[], Any], list[Any]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.broken = self.ready = self.paused = False
        self.error_mode = "global"

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if current_stream() is DEFAULT_STREAM:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if recording() is not None or self.ready:
            raise RuntimeError("This CUDAGraph instance, or this thread, already owns a capture.")
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(f"Unknown capture error mode: {capture_error_mode}")
        self.error_mode = capture_error_mode
        _local.graph = self
        _recordings.append(self)

    def capture_end(self) -> None:
        _local.graph = None
        _recordings.remove(self)
        with marks.hidden():
            for storage, content in self.before.values():
                storage.copy_(content)
            if self.broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            for _, outputs in self.calls:
                for tensor in filter(marks.pooled, outputs):
                    tensor.untyped_storage().fill_(0xFF)
        self.before, self.ready = {}, True

    def writes(self, tensors: Sequence[Tensor]) -> None:
        """Before a call: of what it writes, that which is not the graph's own is as before when the recording ends."""
        for tensor in tensors:
            storage, key = tensor.untyped_storage(), marks.key_of(tensor)
            if key is not None and key not in self.before and not marks.pooled(tensor):
                with marks.hidden():
                    self.before[key] = storage, torch.UntypedStorage(storage.nbytes()).copy_(storage)

    def record(self, call: Callable[[], Any], result: Any) -> None:
        """After a call: a replay makes it again and copies what it returns into ``result``."""
        if not self.paused:
            self.calls.append((call, marks.tensors_in(result)))

    def replay(self) -> None:
        if not self.ready:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        with marks.hidden():
            for call, outputs in self.calls:
                for old, new in zip(outputs, marks.tensors_in(call()), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def pool(self) -> tuple[str, int]:
        return "pool", id(self)

    def reset(self) -> None:
        self.calls, self.ready = [], False


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """What is done inside is dropped, so it is not recorded; a wait for the device breaks the recording still."""
    graph = recording()
    if graph is not None:
        graph.paused = True
    try:
        yield
    finally:
        if graph is not None:
            graph.paused = False


class graph:
    """`torch.cuda.graph`, which leaves its stream in force where the recording breaks off."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.graph, self.pool, self.stream = cuda_graph, pool, stream or Stream()
        self.error_mode = capture_error_mode

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self.entered = torch.cuda.stream(self.stream)
        self.entered.__enter__()
        self.graph.capture_begin(pool=self.pool, capture_error_mode=self.error_mode)

    def __exit__(self, *error: Any) -> None:
        self.graph.capture_end()
        self.entered.__exit__(None, None, None)
