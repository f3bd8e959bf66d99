"""What each op launches on a GPU, counted without one: Triton kernels and PyTorch's own, fills and copies included.

``PYTHONPATH=tests:. python tests/device_kernels.py`` prints the table that docs/kernels.md holds.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import samples
import torch
from aot.ahead_of_time import FakeDriver
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

from step_kernels import validation
from step_kernels.library import op_modules, schemas

ARCHITECTURE = 90
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _PyTorchKernels(TorchDispatchMode):
    """Every call that is neither a view nor an allocation runs at least one kernel."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ALLOCATIONS:
            self.names.append(f"PyTorch {name}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The kernels that would be launched inside, in order; nothing runs."""
    names: list[str] = []
    launch, active = KernelInterface.__getitem__, driver._active
    KernelInterface.__getitem__ = lambda self, grid: lambda *_, **__: names.append(self.fn.__name__)
    driver._active = FakeDriver(ARCHITECTURE)  # launchers ask it for block sizes
    try:
        with _PyTorchKernels(names), torch.no_grad():
            yield names
    finally:
        KernelInterface.__getitem__, driver._active = launch, active


def on_meta(value: Any) -> Any:
    """The same argument without memory."""
    if isinstance(value, (list, tuple)):
        return type(value)(on_meta(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def kernels_of(op: str, *arguments: Any) -> list[str]:
    """What the Triton floor of a registered op launches for these arguments."""
    floor: Callable[..., Any] = getattr(importlib.import_module(f"step_kernels.triton.{op_modules[op]}"), op)
    arguments = on_meta(arguments)
    with without_checks_of_values(), recorded() as names:
        floor(*arguments)
    return names


@contextlib.contextmanager
def without_checks_of_values() -> Iterator[None]:
    """from_sides reads its argument to name a wrong cell; graph capture leaves that out, and so does the table."""
    module = importlib.import_module("step_kernels.triton.layout")
    module.validate_sides = lambda sides: None
    try:
        yield
    finally:
        module.validate_sides = validation.validate_sides


def table() -> str:
    """Markdown: each op, with the fewest and the most that any of its samples launches."""
    lines = ["| op | device kernels | which |", "|---|---:|---|"]
    for op in sorted(schemas):
        found = [kernels_of(op, *arguments) for arguments in samples.SAMPLES[op]()]
        few, many = min(filter(None, found), key=len), max(found, key=len)  # empty batches launch nothing
        if len(few) == len(many):
            lines.append(f"| `{op}` | {len(many)} | {', '.join(many)} |")
        else:
            lines.append(f"| `{op}` | {len(few)} - {len(many)} | {', '.join(few)}; at most {', '.join(many)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
