"""What the commands of ``python -m step_kernels.model`` share: errors of one line, and the values of common options."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch

__all__ = ["OneLineParser", "UsageError", "channel_values", "checked_device", "image_size"]


class UsageError(Exception):
    """What was asked cannot be run; the message is one line that says why and what would work."""


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of "512" or "512x768"."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expects positive pixels such as 512, or HEIGHTxWIDTH, got {text!r}")
    return sizes[0], sizes[-1]


def channel_values(text: str) -> tuple[float, ...]:
    """Red, green and blue of "0.485,0.456,0.406"."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"expects red,green,blue for pixels scaled to 0..1, such as 0.5,0.5,0.5, got {text!r}"
        )
    return values


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
