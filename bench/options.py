"""What the command line asks of every job."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from step_kernels.model.cli.device import checked_device
from step_kernels_cli import UsageError

LATEST = Path(__file__).resolve().parent / "results" / "latest"
PATCH_SIZE = 16


@dataclass(frozen=True)
class Options:
    """One run."""

    device: torch.device
    dtype: torch.dtype
    vit: tuple[str, ...] = ("small",)  # presets; the first one is the job's main model
    size: tuple[int, ...] = (512,)  # sides of the square images in pixels
    batch: tuple[int, ...] = (4,)  # images per call
    seconds: float = 20.0  # of the clock, for each case
    policy: str = "variance"  # executed and counted; "given": its layouts are there before the clock starts
    compile: bool = False  # whether contenders that torch.compile makes take part
    only: tuple[str, ...] = ()  # parts of case or contender names; empty for all
    images: Path | None = None  # a folder of pictures; None for scikit-image's photographs
    out: Path = LATEST

    @property
    def fixed(self) -> dict[str, str]:
        """What every row says."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    def command(self, job: str) -> str:
        """What repeats the run, without paths: a folder's name says more about the person than about the run."""
        known = {**vars(self), "dtype": self.fixed["dtype"]}
        words = ["python -m bench", job, "--compile" if self.compile else "--no-compile"]
        for flag in ("device", "dtype", "vit", "size", "batch", "seconds", "policy", "only"):
            values = known[flag] if isinstance(known[flag], tuple) else (known[flag],)
            words += [f"--{flag}", *map(str, values)] if values else []
        return " ".join([*words, *(["--images FOLDER"] if self.images else [])])


def options_of(given: argparse.Namespace, seconds: float) -> Options:
    """What was asked for, defaults filled in; `seconds` is the job's own. UsageError where a value cannot be run."""
    device = checked_device(given.device)
    gpu = device.type == "cuda"
    large = gpu and given.job != "main"  # photographs are small
    for side in given.size or ():
        if side < 1 or side % PATCH_SIZE:
            raise UsageError(f"--size expects positive multiples of the patch size {PATCH_SIZE}, got {side}")
    return Options(
        device,
        getattr(torch, given.dtype or ("bfloat16" if gpu else "float32")),
        tuple(given.vit or ["large" if large else "small"]),
        tuple(given.size or [1024 if large else 512]),
        tuple(given.batch or [8 if large else 4]),
        seconds if given.seconds is None else given.seconds,
        given.policy,
        gpu if given.compile is None else given.compile,
        tuple(given.only),
        given.images,
        given.out or LATEST,
    )
