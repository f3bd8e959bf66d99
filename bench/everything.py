"""`python -m bench all`: every job in a process of its own, inside a budget; a crash or a hang of one costs that one alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from step_kernels.model.cli.errors import UsageError

from . import report, result

INTERRUPTED = 130
GRACE_SECONDS = 10.0  # to print what there is
LEAST_SECONDS = 20.0
TESTS, TESTS_XML, TESTS_JSON = "gpu tests", "gpu-tests.xml", "gpu-tests.json"
# Name, share of the minutes, and what follows `python -m bench`; the most important first.
ON_A_GPU = (
    ("model", 7.0, ["model", "--vit", "large", "base", "small", "--batch", "8", "1", "32"]),
    ("kernels", 2.5, ["kernels"]),
    ("peers", 1.5, ["peers"]),
)
ON_A_CPU = (
    ("main", 4.0, ["main", "--policy", "given"]),
    ("model", 2.0, ["model"]),
    ("kernels", 2.0, ["kernels"]),
    ("peers", 1.0, ["peers"]),
)


def run(device: torch.device, out: Path, minutes: float | None, *, gpu_tests: bool) -> int:
    """Runs the jobs one after the other, prints what ran and the goals; 1 where something failed, 130 where it was interrupted."""
    minutes = (9 if device.type == "cuda" else 4) if minutes is None else minutes
    if not 0 < minutes < math.inf:
        raise UsageError(f"--minutes expects a positive number, got {minutes}")
    result.refuse_another_machine(out, "", result.environment(device))
    out.mkdir(parents=True, exist_ok=True)
    for name in (*result.FILES, TESTS_JSON):  # an earlier run's would pass for this one's
        (out / name).unlink(missing_ok=True)
    parts, started = parts_of(device, out.resolve(), gpu_tests=gpu_tests), time.monotonic()
    told, statuses = list[str](), list[int | None]()
    for number, (name, share, command) in enumerate(parts):
        own = (60 * minutes - (time.monotonic() - started)) * share / sum(part[1] for part in parts[number:])
        if INTERRUPTED in statuses or own < LEAST_SECONDS:
            told.append(f"- {name}: not run, {'interrupted' if INTERRUPTED in statuses else 'no time left'}")
            continue
        print(f"\n=== {name}, up to {own:.0f} s", flush=True)
        begun = time.monotonic()
        statuses.append(launch(command, own))
        known = {None: "cut short", 0: "finished", INTERRUPTED: "interrupted"}
        how = known.get(statuses[-1], f"FAILED, exit status {statuses[-1]}")
        told.append(f"- {name}: {how}, {time.monotonic() - begun:.0f} s")
    told += [f"- {TESTS}: {counted(out)}"] if gpu_tests else []
    runs = result.runs_in(out)
    text = "\n".join(["# Summary", "", *told, "", report.goals_of(runs)])
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    failed = any(statuses) or any(row.failed for run in runs.values() for row in run.rows)
    return INTERRUPTED if INTERRUPTED in statuses else int(failed)


def parts_of(device: torch.device, out: Path, *, gpu_tests: bool) -> list[tuple[str, float, list[str]]]:
    """Name, share of the minutes, command line."""
    jobs = ON_A_GPU if device.type == "cuda" else ON_A_CPU
    where = ["--device", str(device), "--out", str(out)]
    parts = [(name, share, [sys.executable, "-m", "bench", *words, *where]) for name, share, words in jobs]
    if gpu_tests:
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-m", "gpu"]
        parts.insert(0, (TESTS, 2.5, [sys.executable, *words, "tests/gpu", f"--junitxml={out / TESTS_XML}"]))
    return parts


def launch(command: Sequence[str], seconds: float) -> int | None:
    """Exit status of a command in the checkout; None where its time was up, 130 where the user had enough."""
    process = subprocess.Popen(command, cwd=result.REPOSITORY, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and what it has started: as Ctrl-C does, so that it shows what it has, then for good."""
    gone = ProcessLookupError, PermissionError
    try:
        with contextlib.suppress(*gone, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_SECONDS)
    finally:  # however impatient the user is
        with contextlib.suppress(*gone):
            os.killpg(process.pid, signal.SIGKILL)


def counted(out: Path) -> str:
    """The tests by outcome, into a JSON file without pytest's messages, which may hold paths."""
    try:
        cases = list(xml.etree.ElementTree.parse(out / TESTS_XML).iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return "no report"
    outcomes = [{part.tag for part in case} for case in cases]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    failures = [name for name, tags in zip(names, outcomes, strict=True) if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for tags in outcomes)
    counts = {"passed": len(cases) - len(failures) - skipped, "failed": len(failures), "skipped": skipped}
    (out / TESTS_JSON).write_text(json.dumps({**counts, "failures": failures}, indent=1) + "\n", encoding="utf-8")
    (out / TESTS_XML).unlink()
    return ", ".join([*(f"{count} {outcome}" for outcome, count in counts.items()), *failures])
