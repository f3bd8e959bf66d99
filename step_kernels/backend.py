"""Which floor runs an op: Triton kernels or the PyTorch reference, and why.

``auto`` (the default) takes Triton on NVIDIA GPUs of compute capability 8.0 and up, and the reference everywhere else. Where that
leaves an accelerator unused, one warning names the reason. ``triton`` never falls back: it runs the kernels or raises. The setting is
one global of the process (not of the thread: autograd runs backward passes in threads of its own).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
MINIMUM_CAPABILITY = (8, 0)
_CPU = torch.device("cpu")


class UnusedAcceleratorWarning(UserWarning):
    """The PyTorch reference runs on an accelerator that Triton kernels could have used."""


def _validated(name: object, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return str(name)


_setting = _validated(os.environ.get("STEP_KERNELS_BACKEND", "auto"), "environment variable STEP_KERNELS_BACKEND")
_warned: set[str] = set()


class use_backend:
    """Choose the backend from now on, or for the length of a ``with`` block.

    ::

        use_backend("reference")        # until changed again
        with use_backend("triton"):     # restored on leaving
            ...

    Args:
        name: ``"auto"``, ``"triton"`` (raises where the kernels cannot run; CPU tensors need ``TRITON_INTERPRET=1``) or ``"reference"``.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        global _setting
        self.previous = _setting
        _setting = _validated(name, "name")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _setting
        _setting = self.previous


def current_backend() -> str:
    """The setting in force: ``"auto"``, ``"triton"`` or ``"reference"``."""
    return _setting


def why_not_triton(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """The reason why no op can run as a Triton kernel on tensors of this device and dtype; None when they can."""
    if dtype == torch.float64:
        return "the Triton kernels of this package compute in float32, so float64 tensors take the reference"
    return why_no_triton_on(device)


@functools.cache
def why_no_triton_on(device: torch.device) -> str | None:
    """The reason why no Triton kernel can run on ``device``; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "CPU tensors run in Triton's interpreter only (set TRITON_INTERPRET=1 before importing triton)"
    if device.type != "cuda":
        return f"Triton kernels of this package run on NVIDIA GPUs, not on {device.type!r} devices"
    if torch.version.hip is not None:
        return "Triton kernels of this package are for NVIDIA GPUs; this PyTorch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"compute capability {found} of {torch.cuda.get_device_name(device)} is below 8.0"
    return None


def selected_backend(op: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """``"triton"`` or ``"reference"``: what an op runs as on a device under the setting in force.

    Args:
        op: a registered op, as in ``torch.ops.step_kernels``: ``"merge_tokens"``, say.
        device: ``"cpu"``, ``"cuda"``, ...
        dtype: of the op's tensors; ``torch.float64`` has no kernels. None: any other.

    Raises:
        ValueError: no such op.
        RuntimeError: the setting is ``"triton"`` and the kernels cannot run there, or no such device.
    """
    if not hasattr(torch.ops.step_kernels, op):
        raise ValueError(f"op: expected a registered op of step_kernels, got {op!r}")
    return _selected(op, torch.device(device), dtype)


def _selected(op: str, device: torch.device, dtype: torch.dtype | None) -> str:
    if _setting == "reference":
        return "reference"
    if _setting == "auto" and device.type == "cpu":
        return "reference"
    reason = why_not_triton(device, dtype)
    if reason is None:
        return "triton"
    if _setting == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but step_kernels.{op} cannot run on {device}: {reason}")
    if reason not in _warned:
        _warned.add(reason)
        message = f"step_kernels.{op} runs its PyTorch reference on {device}: {reason}"
        warnings.warn(message, UnusedAcceleratorWarning, stacklevel=2)
    return "reference"


def implementation(module: str, op: str) -> Callable[..., Any]:
    """The function behind the registered op ``op``: looks at its tensors, then calls the floor selected for it."""
    _module("reference", module)

    def run(*args: Any) -> Any:
        device, dtype = _device_and_dtype_of(args)
        device = device or _CPU  # where there is no tensor
        floor = floor_of(module, op, device, dtype)
        # Gradients are the op's own business. So are dtypes: an op computes in that of its inputs, also where autocast is on.
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        if not autocast and not torch.is_grad_enabled():
            return floor(*args)
        with torch.no_grad(), torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
            return floor(*args)

    return run


def floor_of(module: str, op: str, device: torch.device, dtype: torch.dtype | None) -> Callable[..., Any]:
    """The selected floor's function of a registered op."""
    return getattr(_module(_selected(op, device, dtype), module), op)


@functools.cache  # the kernels' at the first call: importing this package imports no Triton
def _module(floor: str, name: str) -> ModuleType:
    return importlib.import_module(f"step_kernels.{floor}.{name}")


def _device_and_dtype_of(args: Sequence[Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """The device of an op's tensors; float64 where one of them is. (Not 0-dim ones: thresholds, compared as fp32 in any case.)"""
    device, wide = None, None
    for argument in args:
        if isinstance(argument, Tensor):
            device = device or argument.device
            if argument.dtype == torch.float64 and argument.ndim:
                wide = torch.float64
        elif isinstance(argument, (list, tuple)):
            inner = _device_and_dtype_of(argument)
            device, wide = device or inner[0], wide or inner[1]
    return device, wide
