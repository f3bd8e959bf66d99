"""What a reader must know about the machine and the software behind a number, and nothing that identifies a person.

No host name, user name or path is recorded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and date, as JSON-ready values; None where a fact cannot be had."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "load_average": _load_average(),
        **_gpu(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "step_kernels": _package_version(),
        **git_state(REPOSITORY),
    }


def one_line(environment: dict[str, Any]) -> str:
    """The sentence printed above the table."""
    processor = environment["gpu"] or environment["cpu"] or environment["architecture"]
    commit = environment["commit"]
    state = "no commit" if commit is None else commit[:10] + ("+changes" if environment["dirty"] else "")
    return (
        f"{processor}, cores: {environment['cores']}, threads: {environment['threads']}, "
        f"{environment['memory_gib']} GiB; Python {environment['python']}, torch {environment['torch']}, "
        f"step-kernels {environment['step_kernels']} ({state})"
    )


def git_state(folder: Path) -> dict[str, Any]:
    """`commit` and `dirty` of the checkout that holds `folder`; both None outside git or before the first commit."""
    commit = _output(["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"])
    status = _output(["git", "-C", str(folder), "status", "--porcelain"])
    return {"commit": commit, "dirty": None if commit is None or status is None else bool(status)}


def _output(command: list[str]) -> str | None:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()


def _cpu_name() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or None


def _usable_cores() -> int | None:
    # A container or taskset leaves fewer cores than the machine has; os.cpu_count() would name the machine's.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None, "gpu_capability": None, "gpu_memory_gib": None, "gpu_driver": None, "cuda": None}
    properties = torch.cuda.get_device_properties(device)
    # Device numbers of nvidia-smi ignore CUDA_VISIBLE_DEVICES, and all GPUs of a machine share one driver.
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_version() -> str | None:
    """The imported package's own version: a checkout on the path may differ from an installed wheel."""
    package = sys.modules.get("step_kernels")
    return getattr(package, "__version__", None) or _version("step-kernels")
