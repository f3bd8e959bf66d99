"""``python -m step_kernels``: versions, devices, the backend and why, and a check of every op against its reference."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from importlib import metadata

import torch

from . import __version__, backend, selfcheck
from .triton import KERNELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m step_kernels", description=__doc__)
    parser.parse_args(argv)
    _print_versions()
    try:
        failures = sum(_check(device) for device in _devices())
    except RuntimeError as error:  # backend "triton" was asked for where it cannot run
        print(f"\nFAILED: {error}")
        return 1
    print("\nOK" if not failures else f"\nFAILED: {failures} mismatches")
    return 1 if failures else 0


def _check(device: torch.device) -> int:
    """Run every op on the device in every dtype; the number of mismatches."""
    print(f"\n{_name(device)}: {_why(device)}")
    failures = 0
    for dtype in DTYPES:
        outcomes = list(selfcheck.run(device, dtype))
        failed = [outcome for outcome in outcomes if not outcome.passed]
        failures += len(failed)
        print(f"  {str(dtype).removeprefix('torch.'):>8}: {len(outcomes) - len(failed)} of {len(outcomes)} cases agree")
        for outcome in failed:
            print(f"    MISMATCH {outcome.op}: error {outcome.error:.3g}, allowed {outcome.bound:.3g}")
    return failures


def _print_versions() -> None:
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    print(f"step_kernels {__version__}, torch {torch.__version__}, triton {triton}, python {platform.python_version()}")
    print(
        f"backend setting: {backend.current_backend()}; ops with a Triton kernel: {', '.join(sorted(KERNELS)) or 'none yet'}"
    )


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _name(device: torch.device) -> str:
    return str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def _why(device: torch.device) -> str:
    setting = backend.current_backend()
    if setting == "reference":
        return "PyTorch reference, as the setting asks"
    if setting == "auto" and device.type == "cpu":
        return "PyTorch reference, the default on CPUs"
    reason = backend.why_no_triton_on(device)
    return (
        f"PyTorch reference: {reason}" if reason else "Triton kernels where an op has one, else the PyTorch reference"
    )


if __name__ == "__main__":
    sys.exit(main())
