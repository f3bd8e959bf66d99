"""`python -m bench.suite.gpu_tests --out FOLDER`: tests/gpu under pytest; counts and names of failures go to gpu-tests.json.

Messages stay on the screen: they may hold paths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..environment import REPOSITORY

JSON_NAME = "gpu-tests.json"
VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS_TO_WRITE = 8.0
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs the tests; pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.suite.gpu_tests")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:N, which is then all that the tests see")
    parser.add_argument("--tests", default="tests/gpu", help="what pytest runs, from the repository root")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Without the checkout's own warning filters, which name packages that need not be there.
        options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-m", "gpu", f"--junitxml={report}"]
        status = _run([sys.executable, "-m", "pytest", *options, given.tests], visible(given.device, os.environ))
        counts = counted(report, interrupted=status == INTERRUPTED)
    (given.out / JSON_NAME).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return status


def visible(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which "cuda" is `device`; tests do not ask which."""
    _, _, index = device.partition(":")
    if not index:
        return {**environment}
    shown = [name for name in environment.get(VISIBLE, "").split(",") if name]
    return {**environment, VISIBLE: shown[int(index)] if shown else index}


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Exit status; an interrupt reaches pytest, too, which then writes down what it has done so far."""
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_WRITE)
        process.kill()
        return INTERRUPTED


def counted(report: Path, *, interrupted: bool = False) -> dict[str, Any]:
    """Counts by outcome, seconds, and the names of the tests that failed, from pytest's XML; empty where there is none, or a part of it."""
    try:
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return {}
    if interrupted:
        del cases[-1:]  # the one that was running, which looks like one that passed
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "seconds": round(sum(float(case.get("time", "0")) for case in cases), 1),
        "complete": not interrupted,
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


if __name__ == "__main__":
    sys.exit(main())
