"""Progress: plain lines without a terminal, a bar with one."""

from __future__ import annotations

import io

import pytest

from step_kernels.model.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_rare_without_a_terminal() -> None:
    stream, now = io.StringIO(), [0.0]
    with Progress("timing", 100, stream=stream, clock=lambda: now[0]) as progress:
        for _ in range(100):
            now[0] += 0.5
            progress.advance("dense")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "timing: started"
    assert lines[1] == "timing: 20 of 100 dense"
    assert lines[-1] == "timing: done"
    assert len(lines) == 7
    assert "\r" not in stream.getvalue()


def test_bar_on_a_terminal_stops_at_its_total() -> None:
    pytest.importorskip("tqdm", reason="tqdm comes with the extra bench")
    stream = Terminal()
    with Progress("timing", 30, stream=stream) as progress:
        progress.reach(12, "dense")
        progress.reach(33, "merged")
    shown = stream.getvalue()
    assert "12/30 dense" in shown.replace(" , ", " ")
    assert "30/30" in shown.rstrip().split("\r")[-1]


def test_terminal_without_tqdm_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    stream = Terminal()
    with Progress("timing", 1, stream=stream) as progress:
        progress.advance()
    assert stream.getvalue() == "timing: started\ntiming: done\n"
