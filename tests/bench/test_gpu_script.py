"""bench/gpu.sh: every step in its order, cut off in time, whatever became of the others; and the table that it leaves."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gpu.conftest import ORDER, pytest_configure

import step_kernels_cli
from bench.__main__ import parser

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs bash and GNU's coreutils")

# In the place of the interpreter: the self-check fails, the first tests hang, the rest passes.
PYTHON = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
"-c import xdist") exit 1 ;;
"-m step_kernels") echo "FAILED: 1 of | things"; exit 1 ;;
*" tests/gpu/test_capture.py "*) echo "still alive"; exec sleep 60 ;;
*--ignore*) echo "2 passed" ;;
*"model "*--no-compile*) echo "results: eager/model.json" ;;
*"bench model"*) echo "results: model.json" ;;
*) echo "other results" ;;
esac
"""


def run(folder: Path, out: Path, minutes: str, *steps: str) -> subprocess.CompletedProcess[str]:
    python = folder / "python3"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    named = {"PYTHON": str(python), "CALLS": str(folder / "calls"), "MINUTES": minutes, "OUT": str(out)}
    return subprocess.run(
        ["bash", "bench/gpu.sh", *steps], cwd=ROOT, env=os.environ | named, capture_output=True, text=True, check=False
    )


def rows(out: Path) -> list[list[str]]:
    lines = (out / "summary.md").read_text(encoding="utf-8").splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with `calls` and `out`."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, run(folder, folder / "out", "0.4")


def test_a_failure_and_a_hang_stop_none_of_the_steps_after_them(finished) -> None:
    folder, done = finished
    out = folder / "out"
    table = rows(out)
    assert [(name, ended) for name, ended, _, _ in table] == [
        ("self-check", "FAILED, exit status 1"),
        ("tests", "cut off"),
        ("tune", "passed"),
        ("eager-model", "passed"),
        ("model", "passed"),
        ("other-tests", "passed"),
        ("kernels", "passed"),
        ("peers", "passed"),
    ]
    assert table[0][3] == "FAILED: 1 of / things" and table[1][3] == "still alive" and table[5][3] == "2 passed"
    assert 0 < int(table[1][2]) < 10
    assert done.returncode == 1 and (out / "summary.md").read_text(encoding="utf-8") in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "summary.md",
        "selfcheck.log",
        "tests.log",
        "tune.log",
        "bench.log",
    }


def test_its_commands_exist(finished) -> None:
    calls = [shlex.split(line) for line in (finished[0] / "calls").read_text(encoding="utf-8").splitlines()]
    jobs = [call[2:] for call in calls if call[:2] == ["-m", "bench"]]
    assert [parser().parse_intermixed_args(job).job for job in jobs] == ["model", "model", "kernels", "peers"]
    (tuning,) = (call[3:] for call in calls if call[:3] == ["-m", "step_kernels", "tune"])
    assert step_kernels_cli.parser().parse_args(["tune", *tuning]).out == finished[0] / "out/tuned.json"
    named = [word.removeprefix("--ignore=") for call in calls for word in call if "tests/" in word]
    assert len(named) == 7 and all((ROOT / path).exists() for path in named)
    risky = {name for name, rank in ORDER.items() if rank < 0}  # which the whole suite runs first, too
    assert {Path(path).name for path in named} - {"gpu"} == risky


def test_processes_share_out_the_cores(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    taken = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)  # as a process gets: fewer than the machine has, perhaps
    for workers in ("1", "8", "16", "32"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
        pytest_configure(pytestconfig)
    assert taken == [2, 1, 1]


def test_steps_that_are_named_share_the_time(tmp_path: Path) -> None:
    assert run(tmp_path, tmp_path / "out", "0.1", "kernels", "tune").returncode == 0
    assert [(name, ended) for name, ended, _, _ in rows(tmp_path / "out")] == [
        ("tune", "passed"),
        ("kernels", "passed"),
    ]
    for unknown in ("bench", ""):
        done = run(tmp_path, tmp_path / "other", "1", unknown)
        assert done.returncode == 2 and done.stderr.startswith(f"gpu.sh: no step {unknown}: there are ")


def test_no_time_and_a_folder_of_another_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, out, "0")
    assert {ended for _, ended, _, _ in rows(out)} == {"not run, no time left"}
    again = run(tmp_path, out, "0")
    assert again.returncode == 2 and "name an empty folder" in again.stderr
