"""What one more call costs beside time, on a GPU: peak memory, kernels, host syncs; and a trace of it where one is asked for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from step_kernels.model.graph.cuda_graph import sync_debug_mode

Folder = Path | None
COPIES = re.compile(r"^mem(cpy|set)", re.IGNORECASE)


def measure(call: Callable[[], Any], held_bytes: int, folder: Folder, name: str) -> dict[str, int]:
    """`peak_bytes`, held ones included, and `syncs`; with a folder for the trace `kernels` too. On a CPU nothing but the trace.

    The profiler is used only where it is asked for: it stays attached to the driver, and times taken afterwards may be longer.
    """
    found = {}
    if torch.cuda.is_available():
        found = {"peak_bytes": held_bytes + peak_bytes(call), "syncs": count_syncs(call)}
    if folder is not None:
        kernels = trace(call, folder / (re.sub(r"\W+", "-", name).strip("-") + ".trace.json"))
        found |= {"kernels": kernels} if found else {}
    return found


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


def trace(call: Callable[[], Any], path: Path) -> int:
    """Writes a chrome trace of one call; returns the kernels that ran, without the driver's copies and fills."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=activities) as seen:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        path.parent.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(path))
        # A range that code gives a name to is shown on the device, too, around its kernels.
        ran = [
            event for event in seen.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
    return sum(not COPIES.match(event.name) for event in ran)
