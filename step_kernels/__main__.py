"""``python -m step_kernels``: versions, devices, the backend and why, and a check of every op against its reference.

On a GPU that runs the Triton kernels also a small model's prediction, as a replayed CUDA graph and compiled. Exit status 1 where something
failed; the last lines are then what a report needs.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata

import torch

from . import __version__, backend, selfcheck, selfcheck_gpu
from .triton import KERNELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(argv: list[str] | None = None) -> int:
    description, _, more = (__doc__ or "").partition("\n\n")
    argparse.ArgumentParser(prog="python -m step_kernels", description=description, epilog=more).parse_args(argv)
    print(_versions())
    print(
        f"backend setting: {backend.current_backend()}; ops with a Triton kernel: {', '.join(sorted(KERNELS)) or 'none yet'}"
    )
    failures = [line for device in _devices() for line in _check(device)]
    print(f"\n{_report(failures)}" if failures else "\nOK")
    return 1 if failures else 0


def _check(device: torch.device) -> list[str]:
    """Run every op on the device in every dtype, and a model where there are kernels for it; a line for each failure."""
    print(f"\n{_name(device)}: {_why(device)}")
    setting, reason = backend.current_backend(), backend.why_no_triton_on(device)
    if setting == "triton" and reason is not None:
        return [f"{device}: backend 'triton' was asked for, but cannot run on {device}: {reason}"]
    failures = []
    for dtype in DTYPES:
        failures += _show(device, str(dtype).removeprefix("torch."), selfcheck.run(device, dtype))
    if device.type == "cuda" and setting != "reference" and reason is None:
        failures += _show(device, "model", selfcheck_gpu.run(device))
    return failures


def _show(device: torch.device, what: str, outcomes: Iterable[selfcheck.Outcome]) -> list[str]:
    """Print how many of the outcomes agree, and each one that does not as it comes; a line for each of these."""
    started, count, failures = time.perf_counter(), 0, list[str]()
    for outcome in outcomes:
        count += 1
        if not outcome.passed:
            wrong = outcome.raised or f"error {outcome.error:.3g}, allowed {outcome.bound:.3g}"
            failures.append(f"{device} {what}, {outcome.op}: {wrong}")
            kind = "ERROR" if outcome.raised else "MISMATCH"
            print(f"    {kind} {outcome.op}: {wrong.splitlines()[0][:200]}", flush=True)
    seconds = f", {time.perf_counter() - started:.1f} s" if device.type == "cuda" else ""
    print(f"  {what:>8}: {count - len(failures)} of {count} cases agree{seconds}", flush=True)
    return failures


def _report(failures: list[str]) -> str:
    gpus = [device for device in _devices() if device.type == "cuda"]
    lines = [
        f"FAILED: {len(failures)}. Please open an issue of this project with these lines:",
        "",
        _versions(),
        f"CUDA {torch.version.cuda}, driver {_driver() if gpus else None}, {platform.system()} {platform.machine()}, backend {backend.current_backend()}",
        *(f"{_name(gpu)}, compute capability {torch.cuda.get_device_capability(gpu)}" for gpu in gpus),
        *(f"- {line}" for line in failures),
    ]
    return "\n".join(lines)


def _versions() -> str:
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
    return f"step_kernels {__version__}, torch {torch.__version__}, triton {triton}, python {platform.python_version()}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


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
    faulthandler.enable()  # where a compiler or the driver dies: in which case
    sys.exit(main())
