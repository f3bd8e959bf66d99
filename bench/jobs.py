"""What a word of the command line runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from step_kernels.extras import how_to_install
from step_kernels.model.cli.device import checked_device
from step_kernels_cli import UsageError

from . import everything, kernels, model, peers, report, result
from . import main as main_job
from .clock import Clock, broken, device_clock, keep_freed_memory, wall_clock
from .engine import Case, compete
from .options import LATEST, Options, options_of


class Job(NamedTuple):
    """What a word of the command line runs: cases, the clock and its seconds for each of them, what a reader must know or may look at."""

    cases: Callable[[Options], Iterator[Case]]
    seconds: float = 6.0
    clock: Callable[[torch.device], Clock] = wall_clock
    notes: Callable[[Options], Sequence[str]] = lambda options: ()
    picture: Callable[[Options], Path] | None = None


JOBS = {
    "main": Job(main_job.cases, main_job.SECONDS, notes=main_job.notes, picture=main_job.picture),
    "kernels": Job(kernels.cases, 0.5, device_clock),
    "model": Job(model.cases),
    "peers": Job(peers.cases, notes=peers.notes),
}


def start(given: argparse.Namespace) -> int:
    """What the words of the command line ask for; the exit status."""
    if given.job == "report":
        return report.command(given.paths, given.write)
    if given.paths or given.write:
        raise UsageError(f"{given.job} takes no files: report does")
    if given.job == "all":
        return everything.run(checked_device(given.device), given.out or LATEST, given.minutes)
    if given.minutes is not None:
        raise UsageError("--minutes is of all")
    return run(given.job, options_of(given, JOBS[given.job].seconds), profile=given.profile, resume=given.resume)


def run(name: str, options: Options, *, profile: bool = False, resume: bool = False) -> int:
    """One job: every case competes, is written down, and at the end stands in the tables.

    A new process takes the place of one whose device was broken; it resumes with the rows of the file that do not stay as they are.
    """
    job, path, traces = JOBS[name], options.out / f"{name}.json", options.out / "traces" if profile else None
    where, interrupted = result.environment(options.device), False
    result.refuse_another_machine(options.out, "" if resume else path.name, where)
    known = {row.key: row for row in (result.read(path).rows if resume else ())}
    done = {key for key, row in known.items() if not (row.problem or "").startswith(result.LOST)}
    doubts = result.doubts(where)
    notes = [*doubts, *job.notes(options)]

    def keep(rows: Iterable[result.Row]) -> None:
        known.update((row.key, row) for row in rows)
        result.Run(options.command(name), where, list(known.values()), notes).write(path)

    try:
        if options.device.index:
            torch.cuda.set_device(options.device)  # which costs are of
        keep_freed_memory()
        clock = job.clock(options.device)
        for case in chosen(job.cases(options), options.only, done):
            print("...", case.name, *(f"{key} {value}" for key, value in case.shape.items()), file=sys.stderr)
            keep(compete(case, clock, seconds=options.seconds, profile_to=traces, keep=keep))
            if broken():
                sys.stdout.flush()
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *([] if resume else ["--resume"])])
    except KeyboardInterrupt:
        interrupted = True
    if not known and not interrupted:
        raise UsageError(f"--only {' '.join(options.only)}: no case and no contender of {name} is called so")
    print(report.document(result.Run("", where, list(known.values()), notes)))
    try:
        if job.picture is not None and not interrupted:
            print(f"picture: {job.picture(options)}", file=sys.stderr)
    except ImportError:
        print(f"no picture: {how_to_install('matplotlib', 'bench')}", file=sys.stderr)
    ended = f"{'interrupted; ' if interrupted else ''}{f'results: {path}' if known else 'no results'}"
    print(*doubts, ended, sep="\n", file=sys.stderr)
    return everything.INTERRUPTED if interrupted else int(any(row.failed for row in known.values()))


def chosen(cases: Iterable[Case], only: Sequence[str], done: Collection[tuple[str, str, str]] = ()) -> Iterator[Case]:
    """The cases of these names; of the others the contenders of these names, with the first one for them to be compared with; nobody who is done."""
    for case in cases:
        names = list(case.contenders)
        if only and not any(part in case.name for part in only):
            named = [name for name in names if any(part in name for part in only)]
            names = list(dict.fromkeys(names[:1] + named)) if named else []
        names = [name for name in names if (case.name, str(dict(case.shape)), name) not in done]
        if names:
            yield dataclasses.replace(case, contenders={name: case.contenders[name] for name in names})
