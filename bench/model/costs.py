"""What a contender costs beside time: memory, host syncs, device kernels. On a CPU none of them is known."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .registry import Built

COPIES = re.compile(r"^mem(cpy|set)", re.IGNORECASE)


@dataclass(frozen=True)
class Costs:
    """Of one call; None where not measured.

    Attributes:
        peak_memory_bytes: what the contender holds between calls (a graph's pool) and what a call allocates at its peak, results
            included; weights, inputs and recorded decisions are not in it.
        host_syncs: as `torch.cuda.set_sync_debug_mode` counts them.
        device_kernels: kernels that ran, copies and fills by the driver left out; only where the profiler is used.
    """

    peak_memory_bytes: int | None = None
    host_syncs: int | None = None
    device_kernels: int | None = None


def measure_costs(built: Built, device: torch.device, *, profile: bool) -> tuple[Costs, list[tuple[str, float]]]:
    """More calls on the first input, after the clock: costs, and `device_events`.

    Args:
        profile: whether the profiler may be used. It stays attached to the driver, so times taken afterwards may be longer.
    """
    if device.type != "cuda":
        return Costs(), []
    peak = built.held_bytes + _peak_of(lambda: built.labels(0))
    syncs = count_syncs(lambda: built.labels(0))
    events = device_events(lambda: built.labels(0)) if profile else []
    return Costs(peak, syncs, len(only_kernels(events)) if events else None), events


def _peak_of(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def count_syncs(call: Callable[[], object]) -> int:
    """Host syncs of one call: PyTorch warns at each one."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def device_events(call: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, microseconds) of everything that ran on the device during one call; none where the profiler sees nothing."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]


def only_kernels(events: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The events without the driver's copies and fills."""
    return [event for event in events if not COPIES.match(event[0])]
