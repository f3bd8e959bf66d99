"""The device that a command's ``--device`` names."""

from __future__ import annotations

import torch

from step_kernels_cli import UsageError

__all__ = ["checked_device"]


def checked_device(name: str | None) -> torch.device:
    """The device called so; None: the first GPU, or the CPU. UsageError where this machine has none of that name."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = ("cuda" if count else "cpu") if name is None else name
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if name != "cpu" and device.type != "cuda":
        raise UsageError(f"--device expects cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and count <= (device.index or 0):
        raise UsageError(f"--device {name} is not there: this machine shows PyTorch {count} CUDA devices")
    return device
