"""What a call costs beside time: memory, host syncs, device kernels; and what ran, for `bench.model.profile`.

On a CPU there are no host syncs and no device kernels to count, and memory is that of tensors alone.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COPIES = re.compile(r"^mem(cpy|set)", re.IGNORECASE)
OURS = "step_kernels::"
MEMORY_EVENT = "[memory]"
Events = list[tuple[str, float]]


@dataclass(frozen=True)
class Costs:
    """Of one call; None where not measured.

    Attributes:
        peak_memory_bytes: what a call's tensors take at their peak, results included, as PyTorch's allocator counts them; on a GPU with
            what the contender holds between calls (a graph's pool). Weights, inputs and recorded decisions are not in it, nor is
            what libraries allocate for themselves.
        host_syncs: as `torch.cuda.set_sync_debug_mode` counts them.
        device_kernels: kernels that ran, copies and fills by the driver left out; only where the profiler is used.
    """

    peak_memory_bytes: int | None = None
    host_syncs: int | None = None
    device_kernels: int | None = None


def measure_costs(
    call: Callable[[], object], device: torch.device, *, held_bytes: int = 0, profiled: bool
) -> tuple[Costs, Events]:
    """More calls, after the clock: costs, and what ran: (name, microseconds), empty unless `profiled`.

    Args:
        call: what was timed.
        device: where it runs.
        held_bytes: device memory held between calls.
        profiled: whether the profiler may be used on a GPU. It stays attached to the driver, so times taken afterwards may be longer.
    """
    if device.type != "cuda":
        peak, events = _cpu_costs(call)
        return Costs(peak), events if profiled else []
    peak = held_bytes + peak_on_device(call)
    syncs = count_syncs(call)
    events = device_events(call) if profiled else []
    return Costs(peak, syncs, len(only_kernels(events)) if events else None), events


def peak_on_device(call: Callable[[], object]) -> int:
    """Bytes that a call allocates on the current CUDA device at its peak, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _cpu_costs(call: Callable[[], object]) -> tuple[int | None, Events]:
    """Peak of the tensors' memory, and ops with their own microseconds, those inside an op of step_kernels under its name."""
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        warnings.simplefilter("ignore")
        result = call()
    del result
    inner: Any = profiler.profiler
    changes = [event.nbytes() for event in inner.kineto_results.events() if event.name() == MEMORY_EVENT]
    peak = max(itertools.accumulate(changes), default=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            (owner_of(event), event.self_cpu_time_total)
            for event in profiler.events()
            if event.device_type == DeviceType.CPU and event.name != MEMORY_EVENT
        ]
    return (peak if peak > 0 else None), found


def owner_of(event: Any) -> str:
    """The name of the outermost op of step_kernels that an op runs in, or its own."""
    name, above = event.name, event
    while above is not None:
        if above.name.startswith(OURS):
            name = above.name
        above = above.cpu_parent
    return str(name)


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
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def device_events(call: Callable[[], object]) -> Events:
    """(name, microseconds) of everything that ran on the device during one call; none where the profiler sees nothing."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [(event.name, event.time_range.elapsed_us()) for event in profiler.events() if ran_on_device(event)]


def ran_on_device(event: Any) -> bool:
    """Whether a profiler's event is work of a CUDA device.

    A range that code gives a name to (`record_function`, the compiler's own) is shown on the device, too, from the first of its kernels
    to the last: beside them it would count all of that time twice.
    """
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def only_kernels(events: Sequence[tuple[str, float]]) -> Events:
    """The events without the driver's copies and fills."""
    return [event for event in events if not COPIES.match(event[0])]
