"""What more calls cost beside time, on a GPU: peak memory, host syncs, the host's own time; and a trace where one is asked for."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from step_kernels.model.graph.cuda_graph import sync_debug_mode

Folder = Path | None
HOST_SECONDS = 0.02  # of calls whose launch is timed: hundreds of a single op, one of a large model


def measure(call: Callable[[], Any], held_bytes: int, folder: Folder, name: str) -> dict[str, int]:
    """`peak_bytes`, held ones included, and `syncs`; nothing on a CPU. With a folder also a trace.

    The profiler is used only where it is asked for: it stays attached to the driver, and times taken afterwards may be longer.
    """
    found = {}
    if torch.cuda.is_available():
        found = {"peak_bytes": held_bytes + peak_bytes(call), "syncs": count_syncs(call)}
    if folder is not None:
        trace(call, folder / (re.sub(r"\W+", "-", name).strip("-") + ".trace.json"))
    return found


def host_microseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Until the host has launched all of a call, on an empty queue: the least of `HOST_SECONDS`. It waits only where the call does."""
    times, end = list[float](), time.perf_counter() + HOST_SECONDS
    while torch.cuda.is_available() and (not times or time.perf_counter() < end):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - begun)
        del result
    return {"host us": 1e6 * min(times)} if times else {}


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a call allocates on the current CUDA device at its peak, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def count_syncs(call: Callable[[], Any]) -> int:
    """Host syncs of one call: PyTorch warns at each one."""
    with sync_debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def trace(call: Callable[[], Any], path: Path) -> None:
    """Writes a chrome trace of one call."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=activities) as seen:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        path.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(path))
