"""Rows and where they were measured: one schema, one JSON file a run, rewritten whenever more is known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from step_kernels.files import replacing
from step_kernels.tune import tiles_in_use
from step_kernels_cli import UsageError

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = ("main.json", "model.json", "kernels.json", "peers.json")
PASSED, FAILED, LATER, NOT_RUN = "passed", "FAILED", "FAILED after the clock", "NOT RUN"
DENSE, COPY = "dense", "copy"
NOT_MEASURED = "not measured"
# Problems of rows. Of what ended with its process, of who has left the device unusable, and of all others in its comparison.
UNFINISHED, BROKE, LOST = "the run ended before its time was taken", "broke the device: ", "the device was broken by "
COMMIT = "STEP_KERNELS_COMMIT"  # names the commit of a copy without .git
SPEEDUP = "speed-up"  # as a fact of a row: why there is none
BUSY_SHARE = 0.5  # of the cores, by load average before the start; above it other work has touched the times


@dataclass(frozen=True)
class Row:
    """One contender of one case. Ratios are derived when a table is made, never stored; None is what was not measured."""

    case: str
    contender: str
    shape: dict[str, Any]
    device: str = ""
    dtype: str = ""
    ours: bool = False
    note: str = ""
    gate: str = NOT_RUN
    problem: str | None = None
    error: float | None = None
    allowed: float | None = None
    rounds: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gflops: float | None = None
    gbytes: float | None = None
    peak_bytes: int | None = None
    syncs: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.gate in (FAILED, LATER)

    @property
    def key(self) -> tuple[str, str, str]:
        """No other row of a run has it."""
        return self.case, str(self.shape), self.contender

    def having(self, **more: Any) -> Row:
        return dataclasses.replace(self, **more)

    def timed(self, milliseconds: Sequence[float], *, flops: float | None, bytes: float | None) -> Row:
        low, median, high = np.percentile(milliseconds, (20, 50, 80)).tolist()
        work = {"gflops": flops and flops / 1e9, "gbytes": bytes and bytes / 1e9}
        return self.having(rounds=len(milliseconds), median_ms=median, p20_ms=low, p80_ms=high, **work)


def counts(row: Row) -> bool:
    return row.gate == PASSED and row.median_ms is not None


def baseline_of(rows: Iterable[Row]) -> Row | None:
    """Dense, or the first contender that is not ours."""
    rivals = [row for row in rows if not row.ours and row.contender != COPY]
    return next((row for row in rivals if row.contender == DENSE), rivals[0] if rivals else None)


def speedup(row: Row, baseline: Row | None) -> float | None:
    """None unless both are right and were timed, and compute the same."""
    if baseline is None or not counts(row) or not counts(baseline) or SPEEDUP in row.facts or row.contender == COPY:
        return None
    return ratio(baseline, row)[0]


def flop_reduction(row: Row, baseline: Row | None) -> float | None:
    """None for single ops: all contenders have to do the same."""
    if baseline is None or "vit" not in row.shape or not row.gflops or not baseline.gflops:
        return None
    return baseline.gflops / row.gflops


def bandwidth(row: Row) -> float | None:
    """GB/s of what any implementation must move."""
    return row.gbytes * 1e3 / row.median_ms if counts(row) and row.gbytes and row.median_ms else None


def comparisons(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The contenders of each case and shape."""
    return (list(same) for _, same in itertools.groupby(rows, key=lambda row: (row.case, row.shape)))


def ratio(over: Row, under: Row, number: str = "ms") -> tuple[float, float, float]:
    """The value, and what it is with p20 and p80 of both times in the place of their medians, the least and the most favourable way."""
    if number == "logits":
        size = math.prod(over.shape[key] for key in ("images", "classes", "pixels", "pixels"))
        return ((over.peak_bytes or 0) / (4 * size),) * 3
    if number == "peak":
        return ((over.peak_bytes or 0) / (under.peak_bytes or 1),) * 3
    factor = (under.gflops or 1) / (over.gflops or 1) if number == "realised" else 1.0
    times = ((over.median_ms, under.median_ms), (over.p20_ms, under.p80_ms), (over.p80_ms, under.p20_ms))
    value, low, high = (factor * (slow or 0) / (fast or 1) for slow, fast in times)
    return value, low, high


@dataclass(frozen=True)
class Run:
    """A JSON file: what was asked, where, what came out, what a reader must know."""

    command: str
    environment: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def write(self, path: Path) -> None:
        """All rows so far, whole or not at all: a run that is cut short leaves what it has."""
        data = dataclasses.asdict(self) | {"environment": dict(self.environment)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(finite(data), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> Run:
    """The run in a file; ValueError where it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(**row) for row in data["rows"])
        return Run(data["command"], data["environment"], rows, tuple(data["notes"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: expected results of bench, got {type(error).__name__}: {error}") from None


def runs_in(folder: Path) -> dict[str, Run]:
    """File name -> results of a folder; ValueError where one holds none, or two are of different machines, or of a clean and a changed checkout."""
    found = {name: read(folder / name) for name in FILES if (folder / name).is_file()}
    for one, other in itertools.pairwise(found):
        first, second = found[one].environment, found[other].environment
        if machine(first) != machine(second):
            raise ValueError(f"{one} and {other} are of different machines or torch: a folder is one machine")
        if first.get("clean") != second.get("clean"):
            raise ValueError(f"{one} and {other}: one is of a clean commit, the other of one with changes")
    return found


def refuse_another_machine(folder: Path, name: str, where: Mapping[str, Any]) -> None:
    """Raises UsageError where files beside the one of this name are of another machine than this one."""
    for other in (folder / other for other in FILES if other != name):
        if other.is_file() and machine(read(other).environment) != machine(where):
            raise UsageError(f"--out {folder}: {other.name} is of another machine or torch, name another folder")


def finite(value: Any) -> Any:
    """JSON has no infinity: what a wrong shape or a NaN errs by is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def environment(device: torch.device) -> dict[str, Any]:
    """What a number is worthless without, and nothing that identifies a person: no host name, user name or path."""
    changes = output("git", "-C", str(REPOSITORY), "status", "--porcelain")
    commit = output("git", "-C", str(REPOSITORY), "rev-parse", "--verify", "HEAD") or os.environ.get(COMMIT)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tiles": tiles_in_use(device),
        "triton": next((one.version for one in metadata.distributions(name="triton")), None),
        "numpy": np.__version__,
        "commit": commit,
        "clean": bool(commit) and not changes,
    }


def machine(where: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two results must share to stand in one folder."""
    return tuple(where.get(key) for key in ("device", "cpu", "cores", "threads", "torch", "tiles"))


def doubts(where: Mapping[str, Any]) -> list[str]:
    """A sentence where other work has touched a CPU's times, and one where nobody can tell what code was measured."""
    load, cores, found = where.get("load"), where.get("cores"), list[str]()
    if where.get("device") == where.get("cpu") and load is not None and cores and load > BUSY_SHARE * cores:
        busy = f"This machine was busy with other work (load {load} before the start)"
        found.append(f"{busy}: times are too long, ratios may be others.")
    if not where.get("commit"):
        found.append(f"NO COMMIT IS KNOWN of these results: outside of a git checkout, {COMMIT} names it.")
    return found


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()


def output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
