"""``step-kernels tune``: which row of each kernel's table is fastest on this GPU, at the sizes of a model.

Every candidate is known to compile for the architecture, without spills (tests/aot). Here each must first agree with the PyTorch reference;
then they run in turns, and the fastest right one is written to a file that the kernels read from then on. Nothing else reads a clock.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from step_kernels_cli import UsageError

from ..backend import why_no_triton_on
from .sizes import sizes_of


def run(given: argparse.Namespace) -> int:
    """Exit status: 0; 1 where no candidate of a kernel was right; 130 after Ctrl-C. UsageError where nothing can be tuned."""
    try:
        device = _gpu()
        from ..triton.common.tuned import UnusedTuningWarning  # these import Triton
        from .measure import device_clock, tune
        from .works import works

        path = file_to_write(given.out)
        sizes = sizes_of(given.model, given.size, given.batch, device, getattr(torch, given.dtype), given.classes)
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    what = f"{given.model}, {given.batch} images of {given.size} x {given.size}, {sizes.tokens} tokens, {given.classes} classes, {given.dtype}"
    print(f"{torch.cuda.get_device_name(device)}: {what}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedTuningWarning)  # of a file about to be written
        return tune(list(works(sizes)), device, sizes.dtype, given.minutes * 60, device_clock, path)


def tiles_in_use(device: torch.device) -> str | None:
    """Which rows kernels run with there, for people; None where no kernels run."""
    if device.type != "cuda" or why_no_triton_on(device) is not None:
        return None
    from ..triton.common import tuned

    return tuned.describe(device)


def _gpu() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reason = "PyTorch finds no GPU" if device.type == "cpu" else why_no_triton_on(device)
    if reason is not None:
        raise ValueError(reason)
    return device


def file_to_write(named: Path | None) -> Path:
    """Where rows are put; ValueError, before anything is measured, where that would lose another file."""
    from ..triton.common import tuned

    path = named or tuned.location()
    if path is None:
        raise ValueError("STEP_KERNELS_TUNED is off: name a file with --out FILE")
    if path.suffix != ".json":
        raise ValueError(f"--out: expected a file *.json, as kernels read no other, got {path}")
    try:
        if path.exists():
            tuned.read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} would be overwritten ({error}): name another file with --out, or move it") from error
    return path
