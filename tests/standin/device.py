"""``torch.cuda``, as far as the package, bench and their tests ask it: an H100."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import torch

from . import dispatch, graphs, marks, syncs, tensors

FREE_BYTES = 2 * 2**30  # tests that need more are left out
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 (stand-in)",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    is_integrated=False,
    gcnArchName="",
)


@contextlib.contextmanager
def device(which: Any) -> Any:
    """The current device; there is one."""
    which = torch.device("cuda", which) if isinstance(which, int) else torch.device(which)
    if which.type != "cuda" or which.index:
        raise RuntimeError("CUDA error: invalid device ordinal")
    yield


def synchronize(device: Any = None) -> None:
    graphs.refuse_wait("the device", whole_device=True)


FUNCTIONS = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device": device,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": lambda device=None: (FREE_BYTES, PROPERTIES.total_memory),
    "memory_allocated": lambda device=None: marks.allocated(),
    "memory_reserved": lambda device=None: marks.reserved(),
    "max_memory_allocated": lambda device=None: marks.peak(),
    "reset_peak_memory_stats": lambda device=None: marks.reset_peak(),
    "empty_cache": lambda: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "synchronize": synchronize,
    "set_sync_debug_mode": syncs.DebugMode.set,
    "get_sync_debug_mode": syncs.DebugMode.get,
    "Stream": graphs.Stream,
    "Event": graphs.Event,
    "stream": graphs.stream,
    "current_stream": graphs.current_stream,
    "default_stream": lambda device=None: graphs.DEFAULT_STREAM,
    "CUDAGraph": graphs.CUDAGraph,
    "graph": graphs.graph,
    "graph_pool_handle": lambda: ("pool", object()),
    "is_current_stream_capturing": lambda: graphs.recording() is not None,
}


def install() -> None:
    """For good, in this process: every thread sees the device."""
    import torch._dynamo  # it looks for a real one

    for name, function in FUNCTIONS.items():
        setattr(torch.cuda, name, function)
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    tensors.install()
    dispatch.StandIn().__enter__()
    run = threading.Thread.run

    def run_on_device(self: threading.Thread) -> None:
        with dispatch.StandIn():
            run(self)

    threading.Thread.run = run_on_device
