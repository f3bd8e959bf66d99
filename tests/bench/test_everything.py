"""``python -m bench all``: jobs one after the other, in processes of their own, inside a budget."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import everything, result
from bench.__main__ import parser
from bench.options import options_of
from bench.result import Run


def run_all(monkeypatch: pytest.MonkeyPatch, folder: Path, programs: dict[str, str], minutes: float) -> tuple[int, str]:
    parts = [(name, 1.0, [sys.executable, "-c", program]) for name, program in programs.items()]
    monkeypatch.setattr(everything, "parts_of", lambda device, out: parts)
    monkeypatch.setattr(everything, "LEAST_SECONDS", 0.0)
    status = everything.run(torch.device("cpu"), folder, minutes)
    return status, (folder / "summary.md").read_text(encoding="utf-8")


def test_all_goes_on_after_a_crash_and_cuts_what_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Run("", result.environment(torch.device("cpu")), ()).write(tmp_path / "main.json")  # of an earlier run
    programs = {"quick": "pass", "broken": "raise SystemExit(3)", "slow": "import time; time.sleep(60)"}
    started = time.monotonic()
    status, text = run_all(monkeypatch, tmp_path, programs, 0.05)
    assert time.monotonic() - started < 30
    assert status == 1
    assert "- quick: finished" in text and "- broken: FAILED, exit status 3" in text and "- slow: cut short" in text
    assert "not measured" in text and not (tmp_path / "main.json").exists()


def test_interrupt_stops_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], *given: object, **more: object) -> None:
        children.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        everything.launch([sys.executable, "-c", "import time; time.sleep(60)"], 60.0)
    assert children[0].wait(20) < 0, "killed"


def test_interrupted_all_sums_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(command: list[str], seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(everything, "launch", interrupted)
    status, text = run_all(monkeypatch, tmp_path, {"first": "pass", "next": "pass"}, 1.0)
    assert status == 130 and "\n- interrupted\n" in text and "next" not in text


def test_nothing_starts_without_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(everything, "parts_of", lambda device, out: [("late", 1.0, [sys.executable])])
    assert everything.run(torch.device("cpu"), tmp_path, 0.01) == 0
    assert "- late: not run, no time left" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_command_lines_of_all_are_such_that_the_jobs_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.options.checked_device", lambda name: torch.device(name))
    for device, jobs in (("cpu", ["main", "model", "kernels", "peers"]), ("cuda", ["model", "kernels", "peers"])):
        parts = everything.parts_of(torch.device(device), tmp_path)
        assert [name for name, _, _ in parts] == jobs
        for name, _, line in parts:
            assert (
                line[1:4] == ["-m", "bench", name]
                and options_of(parser().parse_intermixed_args(line[3:]), 3.0).out == tmp_path
            )
