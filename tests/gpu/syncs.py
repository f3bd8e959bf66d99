"""What the gpu tests hold every op to: nothing waits for the device, runs repeat, a captured call replays, devices need not be current."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tensors import identical
from torch import Tensor

from step_kernels.model.graph.cuda_graph import sync_debug_mode


def no_sync() -> contextlib.AbstractContextManager[None]:
    """Any host sync inside raises."""
    return sync_debug_mode("error")


def ten_runs_are_identical(run: Callable[[], Sequence[Tensor]]) -> None:
    first = run()
    for _ in range(9):
        identical(run(), first)


def capture(run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """A call that replays ``run`` as one CUDA graph, and returns its outputs."""
    run()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


def beside_peer(case: Any) -> Any:
    """``case`` where plain PyTorch computes its yardstick: fp32 on the GPU, too: a CPU adds many short sums where a GPU's matmul adds few long ones."""
    return case.to("cuda") if case.tensors[0].dtype == torch.float32 else case


def needs_memory(gib: float) -> None:
    """Skips where there is less."""
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory")


def same_where_not_current(run: Callable[[str], Sequence[Tensor]]) -> None:
    """Results on the second GPU while the first is current, and on the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        second, first = run("cuda:1"), run("cuda:0")
    identical([x.cpu() for x in second], [x.cpu() for x in first])
