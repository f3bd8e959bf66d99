"""The device that a command's ``--device`` names, and the processes that torchrun starts."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from step_kernels_cli import UsageError

__all__ = ["checked_device", "processes"]


def processes(backend: str = "gloo", **settings: Any) -> tuple[int, int]:
    """This process's number and how many there are, as torchrun tells; several meet in a group of these settings."""
    told = {"RANK": os.environ.get("RANK", "0"), "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1")}
    for variable, value in told.items():
        if not value.isdecimal():
            raise UsageError(f"environment variable {variable}: expected a whole number, got {value!r}")
    rank, world = map(int, told.values())
    if rank >= world:
        raise UsageError(f"environment variable RANK: expected a number below WORLD_SIZE, {world}, got {rank}")
    if world > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(backend, **settings)
        except ValueError as error:
            raise UsageError(f"WORLD_SIZE is {world}, but the processes cannot meet: {error}") from None
    return rank, world


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
