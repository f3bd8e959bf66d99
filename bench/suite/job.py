"""Runs the parts, each in a process of its own, and sums up: a crash or a hang of one costs that one alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import environment
from ..errors import UsageError
from ..evidence.results import read
from ..evidence.text import summary
from ..job import _prepare_folder, shown
from ..schema import FAILED as GATE_FAILED
from .gpu_tests import JSON_NAME as GPU_TESTS_JSON
from .parts import Part
from .settings import SuiteSettings

SUITE_NAME, SUMMARY_NAME = "suite.json", "summary.md"
LEAST_SECONDS = 20.0  # a part with less left than this does not start
OVER = 2.0  # a part that takes this much longer than its share is interrupted; what follows is less important
GRACE_SECONDS = 10.0  # to write down what it has, before it is killed
FINISHED, FAILED, CUT_SHORT, NOT_RUN = "finished", "FAILED", "cut short", "not run"


@dataclass(frozen=True)
class Outcome:
    """How one part went.

    Attributes:
        part: name.
        state: "finished", "FAILED" (a gate, a test or the process), "cut short" by the budget, or "not run".
        seconds: it took.
        problem: why, where it did not finish.
    """

    part: str
    state: str
    seconds: float
    problem: str | None = None


def main(settings: SuiteSettings) -> int:
    """Runs the suite; 1 when a part failed, or a test or a gate in what a part wrote before it was cut short, else 0."""
    outcomes = run(settings)
    return int(any(outcome.state == FAILED for outcome in outcomes) or holds_failures(settings.out))


def holds_failures(folder: Path) -> bool:
    """Whether a test has failed, or a contender its gate, in the results of a folder."""
    tests = folder / GPU_TESTS_JSON
    counts = json.loads(tests.read_text(encoding="utf-8")) if tests.is_file() else None
    if counts and counts["failed"]:
        return True
    try:
        evidence = read(folder)
    except UsageError:
        return False  # the summary says so
    results = (evidence.main, evidence.model, evidence.kernels, evidence.peers)
    return any(row.gate == GATE_FAILED for result in results if result is not None for row in result.rows)


def run(settings: SuiteSettings, now: Callable[[], float] = time.monotonic) -> list[Outcome]:
    """Parts in order, then the summary.

    Raises:
        UsageError: the folder cannot be written to.
    """
    _prepare_folder(settings.out)
    for part in settings.parts:
        (settings.out / part.writes).unlink(missing_ok=True)  # results of an earlier run would pass for this one's
    started, outcomes = now(), []
    facts = environment.describe(torch.device(settings.device))
    print(environment.one_line(facts))
    for number, part in enumerate(settings.parts):
        left = settings.minutes * 60 - (now() - started)
        share = left * part.weight / sum(other.weight for other in settings.parts[number:])
        outcomes.append(run_part(part, settings, share, left, now))
    text = _summed_up(settings.out, outcomes)
    suite = {"kind": "suite", "environment": facts, "minutes": settings.minutes, "parts": [*map(asdict, outcomes)]}
    (settings.out / SUITE_NAME).write_text(json.dumps(suite, indent=2) + "\n", encoding="utf-8")
    (settings.out / SUMMARY_NAME).write_text(text, encoding="utf-8")
    print(f"\n{text}\nresults: {shown(settings.out)}; total: {now() - started:.0f} s")
    return outcomes


def run_part(
    part: Part, settings: SuiteSettings, share: float, left: float, now: Callable[[], float] = time.monotonic
) -> Outcome:
    """One part inside its share, or a little over while there is time left at all."""
    problem = part.missing()
    if problem is None and share < LEAST_SECONDS:
        problem = "--minutes is used up"
    if problem is not None:
        print(f"\n=== {part.name}: {NOT_RUN}, {problem}", flush=True)
        return Outcome(part.name, NOT_RUN, 0.0, problem)
    print(f"\n=== {part.name}: about {share:.0f} s", flush=True)
    started = now()
    status = launch(command_of(part, settings, share), min(left, OVER * share))
    seconds = round(now() - started, 1)
    if status is None:
        return Outcome(part.name, CUT_SHORT, seconds, f"took longer than {min(left, OVER * share):.0f} s")
    if status:
        return Outcome(part.name, FAILED, seconds, f"exit status {status}")
    return Outcome(part.name, FINISHED, seconds)


def command_of(part: Part, settings: SuiteSettings, seconds: float) -> list[str]:
    """The whole command line."""
    out = ["--out", str((settings.out / part.folder).resolve())]
    device = ["--device", settings.device] if part.sets_device else []
    return [sys.executable, "-m", *part.arguments(seconds), *device, *out]


def launch(command: Sequence[str], seconds: float) -> int | None:
    """Runs a command in the checkout; its exit status, or None where it had to be interrupted."""
    # A session of its own, so that compilers' and pytest's processes end with it.
    process = subprocess.Popen(command, cwd=environment.REPOSITORY, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts what still runs, as Ctrl-C does, and kills it where that does not help."""
    for name in ("SIGINT", "SIGKILL"):
        if process.poll() is not None:
            return
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, name))
        else:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _summed_up(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Which parts ran, what the tests say, and the bars."""
    lines = []
    for outcome in outcomes:
        reason = "" if outcome.problem is None else f": {outcome.problem}"
        lines.append(f"- {outcome.part}: {outcome.state}, {outcome.seconds:.0f} s{reason}")
    tests = folder / GPU_TESTS_JSON
    if tests.is_file():
        counts = json.loads(tests.read_text(encoding="utf-8"))
        if counts:
            rest = "" if counts["complete"] else ", the others were not reached"
            lines.append(
                f"- tests: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped{rest}"
            )
            lines += [f"  - FAILED {name}" for name in counts["failures"]]
    try:
        evidence = summary(read(folder))
    except UsageError as nothing:
        evidence = f"No results: {nothing}"
    return "\n".join(["# Summary", "", *lines, "", evidence, ""])
