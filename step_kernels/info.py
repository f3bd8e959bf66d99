"""``step-kernels info``: versions, devices, the backend and why, and a check of every op against its reference."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.util
import math
import multiprocessing
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib import metadata

import torch

from . import __version__, backend, selfcheck, selfcheck_gpu, tune
from .selfcheck import Outcome

Job = Callable[[], list[Outcome]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(given: object = None) -> int:
    """Exit status 1 where something failed; the last lines are then what a report needs."""
    print(_versions())
    print(f"backend setting: {backend.current_backend()}")
    failures = [line for device in _devices() for line in _check(device)]
    print(f"\n{_report(failures)}" if failures else "\nOK")
    return 1 if failures else 0


def _check(device: torch.device) -> list[str]:
    """Run every op on the device in every dtype, and a model where there are kernels for it; a line for each failure."""
    print(f"\n{_name(device)}: {_why(device)}")
    setting, reason = backend.current_backend(), backend.why_no_triton_on(device)
    if setting == "triton" and reason is not None:
        return [f"{device}: backend 'triton' was asked for, but cannot run on {device}: {reason}"]
    jobs = {str(dtype).removeprefix("torch."): functools.partial(selfcheck.run, device, dtype) for dtype in DTYPES}
    if device.type == "cuda" and setting != "reference" and reason is None:
        jobs["model"] = functools.partial(selfcheck_gpu.run, device)
    results = _side_by_side(jobs) if device.type == "cuda" else ((what, job()) for what, job in jobs.items())
    return [f"{device} {what}, {wrong}" for what, outcomes in results for wrong in _show(what, outcomes)]


def _side_by_side(jobs: Mapping[str, Job]) -> Iterator[tuple[str, list[Outcome]]]:
    """Each job's outcomes as it ends. In processes: nearly all of the time is compilation, and what breaks the device breaks it for its own."""
    with contextlib.ExitStack() as stack:
        spawn, futures = multiprocessing.get_context("spawn"), dict[Future[list[Outcome]], str]()
        for what, job in jobs.items():
            process = stack.enter_context(ProcessPoolExecutor(1, spawn, initializer=_tell_where))
            futures[process.submit(job)] = what
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except Exception as error:  # it died
                yield futures[future], [Outcome("its process", math.inf, 0.0, selfcheck.told(error))]


def _tell_where() -> None:
    """Of a process, on stderr: where it stands when it dies, and after a minute, in case that it hangs."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(60)


def _show(what: str, outcomes: list[Outcome]) -> list[str]:
    """Print how many of the outcomes agree, and each one that does not; a line for each of these."""
    failures = []
    for outcome in outcomes:
        if not outcome.passed:
            wrong = outcome.raised or f"error {outcome.error:.3g}, allowed {outcome.bound:.3g}"
            failures.append(f"{outcome.op}: {wrong}")
    print(f"  {what:>8}: {len(outcomes) - len(failures)} of {len(outcomes)} cases agree")
    for wrong in failures:
        print(f"    FAILED {wrong.splitlines()[0][:200]}")
    sys.stdout.flush()
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
    if reason is not None:
        return f"PyTorch reference: {reason}"
    tiles = tune.tiles_in_use(device)
    return "Triton kernels" + (f"; tiles: {tiles}" if tiles else "")
