"""One CUDA graph of a forward pass: warm-up, recording, replay, and what they cost."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

__all__ = ["CudaGraph", "GraphPool"]

Result = TypeVar("Result")

# One recording at a time in the process: it sets the process-wide sync debug mode, and waiting for the device would break another one.
_RECORDING = threading.RLock()


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Where every graph of ``device`` is recorded. PyTorch forbids the default stream and hands the others out in turns, 32 in all."""
    return torch.cuda.Stream(device)


class GraphPool:
    """Device memory that several graphs record into: about as much as the largest takes, when it is recorded first.

    A replay may overwrite what another graph of the pool has left, results too: copy them before, and never run two at once.
    """

    @functools.cached_property
    def handle(self) -> Any:
        """The pool's name to PyTorch."""
        return torch.cuda.graph_pool_handle()


class CudaGraph:
    """Records what a function launches, for replays on the same addresses.

    Memory that the recorded work allocates, cuBLAS's workspace included, stays reserved in ``pool``, by default one of its own.
    ``seconds`` are those spent in `warm_up` and `record`, compiling kernels included; ``memory_bytes``, by how much the
    recording raised the memory that PyTorch has reserved on the device.
    """

    def __init__(self, device: torch.device, pool: GraphPool | None = None) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        self._stream = recording_stream(device)
        self._done = torch.cuda.Event()
        self.seconds = 0.0
        self.memory_bytes = 0

    def warm_up(self, run: Callable[[], Result], *, syncs: bool) -> Result:
        """Run once outside of the recording: kernels compile, libraries allocate what they keep.

        RuntimeError where ``syncs`` is False and the work, or that of another thread meanwhile, waits for the host.
        """
        with _RECORDING, self._timed(), torch.cuda.device(self._device):
            mode, current = torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                torch.cuda.set_sync_debug_mode("default" if syncs else "error")
                with torch.cuda.stream(self._stream):
                    result = run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)
        return result

    def record(self, run: Callable[[], Result]) -> Result:
        """Record ``run``; its results are the tensors that every `replay` writes. Nothing runs yet."""
        # The stream again afterwards: `torch.cuda.graph` leaves its own in force when a recording breaks off.
        stream = torch.cuda.current_stream(self._device)
        with _RECORDING, self._timed(), torch.cuda.device(self._device), torch.cuda.stream(stream):
            torch.cuda.synchronize()
            # As Inductor does: a workspace from before would lie outside of the pool, for others to take or free.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            pool = None if self._pool is None else self._pool.handle
            # thread_local: other threads may allocate meanwhile, a data loader's that pins memory for one.
            with torch.cuda.graph(self._graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
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
