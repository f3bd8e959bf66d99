"""`python -m bench all`: every job in a process of its own, inside a budget; a crash or a hang of one costs that one alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report, result

INTERRUPTED = 130
GRACE_SECONDS = 10.0  # to print what there is
LEAST_SECONDS = 20.0
TESTS = "gpu tests"
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
    """Runs the jobs one after the other, prints what ran and the goals; 1 where one failed, 130 where it was interrupted."""
    on_gpu = device.type == "cuda"
    seconds = 60 * (minutes or (9 if on_gpu else 4))
    parts = [
        (name, share, [sys.executable, "-m", "bench", *words])
        for name, share, words in (ON_A_GPU if on_gpu else ON_A_CPU)
    ]
    parts = [
        (name, share, [*words, "--device", str(device), "--out", str(out.resolve())]) for name, share, words in parts
    ]
    out.mkdir(parents=True, exist_ok=True)
    xml_path = out / "gpu-tests.xml"
    if gpu_tests:
        words = [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "filterwarnings=default",
            "-m",
            "gpu",
            "tests/gpu",
        ]
        parts.insert(0, (TESTS, 2.5, [sys.executable, *words, f"--junitxml={xml_path}"]))
    result.refuse_another_machine(out, "", result.environment(device))
    for name in result.FILES:  # an earlier run's would pass for this one's
        (out / name).unlink(missing_ok=True)
    started, told, statuses = time.monotonic(), [], [0]
    for number, (name, share, command) in enumerate(parts):
        left = seconds - (time.monotonic() - started)
        own = left * share / sum(part[1] for part in parts[number:])
        if INTERRUPTED in statuses or own < LEAST_SECONDS:
            told.append(f"- {name}: not run, {'interrupted' if INTERRUPTED in statuses else 'no time left'}")
            continue
        print(f"\n=== {name}, up to {own:.0f} s", flush=True)
        begun = time.monotonic()
        status = launch(command, own)
        how = {None: "cut short", 0: "finished", INTERRUPTED: "interrupted"}.get(
            status, f"FAILED, exit status {status}"
        )
        told.append(f"- {name}: {how}, {time.monotonic() - begun:.0f} s")
        statuses.append(status or 0)
    if gpu_tests:
        told.append(f"- {TESTS}: {counted(xml_path, out / 'gpu-tests.json')}")
    runs = result.runs_in(out)
    text = "\n".join(["# Summary", "", *told, "", report.goals_of(runs)])
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return INTERRUPTED if INTERRUPTED in statuses else int(any(statuses))


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
    try:
        end_group(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:  # however impatient the user is
        end_group(process, signal.SIGKILL)


def end_group(process: subprocess.Popen[bytes], way: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(process.pid, way)


def counted(report_path: Path, path: Path) -> str:
    """Counts of the tests by outcome, into a JSON file without pytest's messages, which may hold paths."""
    try:
        cases = list(xml.etree.ElementTree.parse(report_path).iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return "no report"
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if {"failure", "error"} & {one.tag for one in case}
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}
    path.write_text(json.dumps({**counts, "failures": failed}, indent=1) + "\n", encoding="utf-8")
    report_path.unlink()
    return ", ".join([f"{count} {outcome}" for outcome, count in counts.items()] + failed)
