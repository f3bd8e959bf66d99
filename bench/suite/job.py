"""Runs the parts, each in a process of its own, and sums up: a crash or a hang of one costs that one alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .. import environment
from ..errors import UsageError
from ..evidence.results import READERS, refuse_mixed
from ..job import _prepare_folder, shown
from ..model.measure import USED_UP
from ..schema import FAILED as GATE_FAILED
from .gpu_tests import JSON_NAME as GPU_TESTS_JSON
from .parts import Part
from .settings import SuiteSettings
from .summary import CUT_SHORT, FAILED, FINISHED, INTERRUPTED, NOT_RUN, Outcome, summed_up, test_counts

SUITE_NAME, SUMMARY_NAME = "suite.json", "summary.md"
LEAST_SECONDS = 20.0  # a part with less left than this does not start
OVER = 2.0  # a part that takes this much longer than its share is interrupted; what follows is less important
GRACE_SECONDS = 10.0  # to write down what it has, before it is killed


def main(settings: SuiteSettings) -> int:
    """Runs the suite; 1 when a part failed, or a test or a gate in what a part wrote before it was cut short, else 0."""
    outcomes = run(settings)
    return int(any(outcome.state == FAILED for outcome in outcomes) or holds_failures(settings))


def holds_failures(settings: SuiteSettings) -> bool:
    """Whether a test has failed, or a contender its gate, in what the parts of this run have written."""
    written = {part.writes for part in settings.parts}
    counts = test_counts(settings.out) if GPU_TESTS_JSON in written else None
    if counts and counts["failed"]:
        return True
    for name in written & READERS.keys():
        # What cannot be read is in the summary.
        with contextlib.suppress(OSError, ValueError, TypeError):
            if any(row.gate == GATE_FAILED for row in READERS[name].read(settings.out / name).rows):
                return True
    return False


def run(settings: SuiteSettings, now: Callable[[], float] = time.monotonic) -> list[Outcome]:
    """Parts in order, then the summary.

    Raises:
        UsageError: the folder cannot be written to, or holds results of another machine.
        KeyboardInterrupt: after the summary of what there is.
    """
    _prepare_folder(settings.out)
    facts = environment.describe(torch.device(settings.device))
    _clear(settings, facts)
    started, outcomes, interrupted = now(), [], False
    print(environment.one_line(facts))
    with ended_like_ctrl_c():
        for number, part in enumerate(settings.parts):
            if interrupted:
                outcomes.append(Outcome(part.name, NOT_RUN, 0.0, INTERRUPTED))
                continue
            begun = now()
            left = settings.minutes * 60 - GRACE_SECONDS - (begun - started)
            share = left * part.weight / sum(other.weight for other in settings.parts[number:])
            try:
                outcomes.append(run_part(part, settings, share, left, now))
            except KeyboardInterrupt:
                interrupted = True
                outcomes.append(Outcome(part.name, CUT_SHORT, round(now() - begun, 1), INTERRUPTED))
        text = summed_up(settings.out, settings.parts, outcomes, settings.minutes)
        suite = {"kind": "suite", "environment": facts, "minutes": settings.minutes, "parts": [*map(asdict, outcomes)]}
        (settings.out / SUITE_NAME).write_text(json.dumps(suite, indent=2) + "\n", encoding="utf-8")
        (settings.out / SUMMARY_NAME).write_text(text, encoding="utf-8")
    print(f"\n{text}\nresults: {shown(settings.out)}; total: {now() - started:.0f} s")
    if interrupted:
        raise KeyboardInterrupt
    return outcomes


def _clear(settings: SuiteSettings, facts: Mapping[str, Any]) -> None:
    """Removes results of an earlier run, which would pass for this one's; those of other parts stay, if they are of this machine."""
    old = {SUITE_NAME, SUMMARY_NAME, *(part.writes for part in settings.parts)}
    kept: dict[str, Mapping[str, Any]] = {}
    for name in sorted(READERS.keys() - old):
        if (settings.out / name).is_file():
            try:
                kept[name] = READERS[name].read(settings.out / name).environment
            except (OSError, ValueError, TypeError) as error:
                raise UsageError(f"--out: {settings.out / name} is not a result of bench: {error}") from None
    if kept:
        refuse_mixed(settings.out, {**kept, "this run": facts})
    for name in old:
        try:
            (settings.out / name).unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"--out {settings.out / name} cannot be replaced: {error.strerror}") from None


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """In this context a request to end, or a terminal that closes, is an interrupt: else the part that runs would be left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {kind: signal.getsignal(kind) for kind in kinds}
    for kind, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup asks
            signal.signal(kind, signal.default_int_handler)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def run_part(
    part: Part, settings: SuiteSettings, share: float, left: float, now: Callable[[], float] = time.monotonic
) -> Outcome:
    """One part inside its share, or a little over while there is time left at all."""
    problem = part.missing()
    if problem is None and share < LEAST_SECONDS:
        problem = USED_UP
    if problem is not None:
        print(f"\n=== {part.name}: {NOT_RUN}, {problem}", flush=True)
        return Outcome(part.name, NOT_RUN, 0.0, problem)
    print(f"\n=== {part.name}: about {share:.0f} s", flush=True)
    started = now()
    status = launch(command_of(part, settings, share), min(left, OVER * share))
    seconds = round(now() - started, 1)
    if status is None:
        return Outcome(
            part.name, CUT_SHORT, seconds, f"took longer than its {min(left, OVER * share):.0f} s of --minutes"
        )
    if status:
        return Outcome(part.name, FAILED, seconds, _reason(status))
    return Outcome(part.name, FINISHED, seconds)


def command_of(part: Part, settings: SuiteSettings, seconds: float) -> list[str]:
    """The whole command line."""
    out = ["--out", str((settings.out / part.folder).resolve())]
    return [sys.executable, "-m", *part.arguments(seconds), "--device", settings.device, *out]


def _reason(status: int) -> str:
    """Why a process has ended."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-status).name}"
    return f"ended by signal {-status}"


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
    """Interrupts what still runs, as Ctrl-C does, and kills what is left then: a compiler's workers outlive a crash."""
    try:
        if process.poll() is None:
            _signal(process, "SIGINT")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
    finally:  # however impatient the user is
        _signal(process, "SIGKILL")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _signal(process: subprocess.Popen[bytes], name: str) -> None:
    """To the process and to all that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left, or nobody but its remains
            os.killpg(process.pid, getattr(signal, name))
    elif process.poll() is None:
        process.kill()
