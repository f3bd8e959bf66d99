"""One CUDA graph of a forward pass: warm-up, recording, replay, and what they cost."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["CudaGraph", "sync_debug_mode"]

Result = TypeVar("Result")

# One recording at a time in the process: it sets the process-wide sync debug mode, and waiting for the device would break another one.
_RECORDING = threading.RLock()


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Where every graph of ``device`` is recorded. PyTorch forbids the default stream and hands the others out in turns, 32 in all."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """What a wait for the device does inside: "default", "warn" or "error". Of the whole process, as in PyTorch."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # it warns once, and after the mode was set
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode(mode)
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python collects its garbage before and not inside: in it may be a dropped capture, which waits for the device."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaGraph:
    """Records what a function launches, for replays on the same addresses.

    Memory that the recorded work allocates, cuBLAS's workspace included, stays reserved for it, or is shared with ``beside``, a recorded
    graph that takes as much: then a replay may overwrite the other's results, and two never run at once. ``seconds`` are those spent in
    `warm_up` and `record`, compiling included; ``memory_bytes``, by how much the recording raised what PyTorch has reserved.
    """

    def __init__(self, device: torch.device, beside: CudaGraph | None = None) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self._pool = None if beside is None else beside._graph.pool()
        self._stream = recording_stream(device)
        self._done = torch.cuda.Event()
        self.seconds, self.memory_bytes = 0.0, 0

    def warm_up(self, run: Callable[[], Result], *, syncs: bool) -> Result:
        """Run once outside of the recording: kernels compile, libraries allocate what they keep.

        RuntimeError where ``syncs`` is False and the work, or that of another thread meanwhile, waits for the host.
        """
        with _RECORDING, self._timed(), torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with sync_debug_mode("default" if syncs else "error"), torch.cuda.stream(self._stream):
                result = run()
            current.wait_stream(self._stream)
        return result

    def record(self, run: Callable[[], Result]) -> Result:
        """Record ``run``; its results are the tensors that every `replay` writes. Nothing runs yet."""
        # The stream again afterwards: `torch.cuda.graph` leaves its own in force when a recording breaks off.
        stream = torch.cuda.current_stream(self._device)
        with _RECORDING, self._timed(), no_collection(), torch.cuda.device(self._device), torch.cuda.stream(stream):
            torch.cuda.synchronize()
            # As Inductor does: a workspace from before would lie outside of the pool, for others to take or free.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            # thread_local: other threads may allocate meanwhile, a data loader's that pins memory for one.
            with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
            torch._C._cuda_clearCublasWorkspaces()
            self.memory_bytes = torch.cuda.memory_reserved() - before
        return result

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Work on the graph's tensors, `replay` among it, on the caller's stream: it starts when the turn before has ended."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def replay(self) -> None:
        """Launch the recorded work again."""
        self._graph.replay()

    def wait(self) -> None:
        """Until the last turn has ended: what it reads may be freed then."""
        self._done.synchronize()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        yield
        torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - start
