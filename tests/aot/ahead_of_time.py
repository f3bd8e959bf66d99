"""Compile, without a GPU, every kernel that host code would launch on a given architecture.

Inside ``compiled(architecture)`` the real launchers run on meta tensors: each ``kernel[grid](...)`` is specialised exactly as at run time
(alignment, == 1, divisibility by 16, constexprs), compiled, recorded, and not run. Not under TRITON_INTERPRET=1: there is no compiler there.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelInterface

from step_kernels.triton.common import tuned

# One of each of architecture_class: kernels with tables of tiles compile for these. 89 and 120 share 86's: one configuration of attention and linear.
CLASSES = (80, 86, 90, 100)
ARCHITECTURES = (*CLASSES, 89, 120)
# Kernels without such tables: every configuration on sm_90, and one beside it on the chip with the least shared memory and on the newest.
BESIDE_90 = (86, 100)
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes per block


class FakeDriver:
    """What JITFunction.run(warmup=True) asks of a driver, and nothing else."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> str:
        return f"fake-sm{self.target.arch}"  # keys Triton's caches: one per architecture

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass
class Launch:
    """One recorded launch."""

    name: str
    grid: tuple[int, ...]
    kernel: Any
    architecture: int

    @property
    def shared_memory(self) -> int:
        """Bytes per block."""
        return self.kernel.metadata.shared

    @cached_property
    def resources(self) -> dict[str, int]:
        """registers, stack (> 0: spills), shared and local bytes, read from the cubin by the bundled cuobjdump."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        assert found is not None, text
        return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))

    def instructions(self, pattern: str) -> int:
        """How often a pattern occurs in the PTX."""
        return len(re.findall(pattern, self.kernel.asm["ptx"]))

    def check(self, *, spilled: int = 0) -> None:
        """Fits the chip's shared memory, needs no scratch memory, spills at most ``spilled`` bytes."""
        where = f"{self.name} on sm_{self.architecture}"
        assert self.shared_memory <= SHARED_MEMORY[self.architecture], f"{where}: {self.shared_memory} B shared memory"
        assert getattr(self.kernel.metadata, "global_scratch_size", 0) == 0, f"{where}: global scratch memory"
        assert self.resources["stack"] <= spilled, f"{where}: {self.resources['stack']} B spilled"


@contextlib.contextmanager
def compiled(architecture: int) -> Iterator[list[Launch]]:
    """Every launch inside is compiled for sm_<architecture> and appended to the list."""
    launches: list[Launch] = []
    active, getitem, run = driver._active, KernelInterface.__getitem__, JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **named)
        bound = dict(zip(self.arg_names, arguments, strict=False)) | named
        size = grid(bound) if callable(grid) else grid
        launches.append(Launch(self.fn.__name__, tuple(size), kernel, architecture))
        return kernel

    def launcher(self: Any, grid: Any) -> Any:
        return lambda *arguments, **named: self.warmup(*arguments, grid=grid, **named)

    driver._active, KernelInterface.__getitem__, JITFunction.run = FakeDriver(architecture), launcher, record
    try:
        yield launches
    finally:
        driver._active, KernelInterface.__getitem__, JITFunction.run = active, getitem, run


def check(launches: list[Launch], names: list[str], *, spilled: int = 0) -> None:
    """These kernels were launched; each passes ``Launch.check``."""
    assert [launch.name for launch in launches] == names
    for launch in launches:
        launch.check(spilled=spilled)


def candidates_of(
    name: str, architecture: int, key: str, rows: Sequence[tuned.Row], run: Callable[[], object]
) -> Iterator[Launch]:
    """The kernel as ``run`` launches it with each of the rows that ``tune`` measures: the checked launches."""
    seen = set()
    for row in rows:
        with tuned.forced(key, row), compiled(architecture) as launches:
            run()
        (launch,) = (launch for launch in launches if launch.name == name)
        launch.check()
        seen.add(launch.kernel.hash)
        yield launch
    assert len(seen) == len(rows) > 1, f"{name}: rows that make no difference"
