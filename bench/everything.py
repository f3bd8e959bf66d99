"""`python -m bench all`: every job in a process of its own, inside a budget; a crash or a hang of one costs that one alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report, result

INTERRUPTED = 130
LEAST_SECONDS = 20.0
# Share of the minutes, and what follows `python -m bench`; the most important first.
ON_A_GPU = ((7.0, "model --vit large base small --batch 8 1 32"), (2.5, "kernels"), (1.5, "peers"))
ON_A_CPU = ((4.0, "main --policy given"), (2.0, "model"), (2.0, "kernels"), (1.0, "peers"))


def run(device: torch.device, out: Path, minutes: float | None) -> int:
    """Runs the jobs one after the other, prints what ran and the goals; 1 where something failed, 130 where it was interrupted."""
    minutes = (9 if device.type == "cuda" else 4) if minutes is None else minutes
    result.refuse_another_machine(out, "", result.environment(device))
    for name in result.FILES:  # an earlier run's would pass for this one's
        (out / name).unlink(missing_ok=True)
    parts, end = parts_of(device, out.resolve()), time.monotonic() + 60 * minutes
    told, status = list[str](), 0
    try:
        for number, (name, share, command) in enumerate(parts):
            begun = time.monotonic()
            own = (end - begun) * share / sum(part[1] for part in parts[number:])
            if own < LEAST_SECONDS:
                told.append(f"- {name}: not run, no time left")
                continue
            print(f"\n=== {name}, up to {own:.0f} s", flush=True)
            how = launch(command, own)
            said = "cut short" if how is None else f"FAILED, exit status {how}" if how else "finished"
            told.append(f"- {name}: {said}, {time.monotonic() - begun:.0f} s")
            status = status or int(bool(how))
    except KeyboardInterrupt:
        told, status = [*told, "- interrupted"], INTERRUPTED
    runs = result.runs_in(out)
    text = "\n".join(["# Summary", "", *told, "", report.goals_of(runs)])
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return status or int(any(row.failed for run in runs.values() for row in run.rows))


def parts_of(device: torch.device, out: Path) -> list[tuple[str, float, list[str]]]:
    """Name, share of the minutes, command line."""
    jobs = ON_A_GPU if device.type == "cuda" else ON_A_CPU
    where = ["--device", str(device), "--out", str(out)]
    return [(line.split()[0], share, [sys.executable, "-m", "bench", *line.split(), *where]) for share, line in jobs]


def launch(command: Sequence[str], seconds: float) -> int | None:
    """Exit status of a command in the checkout; None where its time was up."""
    try:
        return subprocess.run(command, cwd=result.REPOSITORY, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None
