"""`python -m bench kernels` from end to end, what it refuses, and what becomes of torch.compile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import ATTENTION_TASKS, TASKS

from bench import table
from bench.__main__ import main
from bench.environment import REPOSITORY
from bench.kernels import contenders, measure
from bench.kernels.schema import KernelResult
from bench.kernels.settings import ON_DEMAND_ON_A_CPU, OPS, parse
from bench.settings import DEFAULT_OUT

NONSENSE = [
    ["--op", "melt"],
    ["--model", "huge"],
    ["--size", "0"],
    ["--size", "16"],
    ["--size", "100"],
    ["--size", "big"],
    ["--batch", "0"],
    ["--classes", "1"],
    ["--classes", "384", "--model", "small"],
    ["--seed", "-1"],
    ["--minutes", "0"],
    ["--minutes", "nan"],
    ["--compile-minutes", "-1"],
    ["--compile-minutes", "inf"],
    ["--repeats", "0"],
    ["--minutes", "1", "--repeats", "2"],
    ["--device", "toaster"],
    ["--device", "cuda:99"],
    ["--dtype", "int8"],
    ["--policy", "variance"],
    ["surprise"],
    ["kernels"],
]
TINY = ["--device", "cpu", "--model", "tiny", "--size", "64", "--batch", "2", "--classes", "5", "--repeats", "2"]


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, KernelResult]]:
    """Runs the command on two images of 4 x 4 patches: exit status and result."""
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)

    def run(*arguments: str) -> tuple[int, KernelResult]:
        status = main(["kernels", *TINY, *arguments, "--out", str(tmp_path)])
        return status, KernelResult.read(tmp_path / "kernels.json")

    return run


@pytest.mark.parametrize("arguments", NONSENSE, ids=" ".join)
def test_nonsense_gets_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", *arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench: ")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_subcommand_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--size", "64", "kernels"]) == 2
    assert "kernels" in capsys.readouterr().err


def test_output_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["kernels", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "--out" in capsys.readouterr().err


def test_help_from_a_shell() -> None:
    command = [sys.executable, "-m", "bench", "kernels", "--help"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
    assert "--compile-minutes" in finished.stdout
    assert "upsample_argmax" in finished.stdout


def test_defaults_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(["--device", "cpu"])
    assert (settings.model, settings.size, settings.batch, settings.classes) == ("small", 256, 2, 21)
    assert (settings.dtype, settings.out) == ("float32", DEFAULT_OUT)
    assert settings.ops == (*OPS[: -len(ON_DEMAND_ON_A_CPU)],) and settings.ops[-1] == "ragged_attention"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = parse([])
    assert (settings.device, settings.model, settings.size, settings.batch) == ("cuda", "large", 1024, 8)
    assert (settings.classes, settings.dtype, settings.ops) == (150, "bfloat16", OPS)
    assert parse(["--repeats", "3"]).minutes is None
    assert parse(["--op", "scatter_back", "--op", "merge_tokens"]).ops == ("merge_tokens", "scatter_back")


def test_small_run_from_end_to_end(
    tiny_run: Callable[..., tuple[int, KernelResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = tiny_run("--compile-minutes", "0")
    printed = capsys.readouterr()
    assert status == 0
    rows = [row for row in result.rows if row.op != "ragged_attention"]
    assert [row.contender for row in rows] == ["step_kernels", "PyTorch eager", "PyTorch compiled"] * len(TASKS)
    assert [(row.op, row.direction) for row in rows[::3]] == [(op.name, way) for op, way in TASKS]
    rivals = [rival.name for rival in ATTENTION_TASKS[0][0].rivals]
    assert [row.contender for row in result.rows[len(rows) :]] == ["step_kernels", *rivals] * 2
    for ours, eager, compiled in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert ours.gate == eager.gate == "PASSED", (ours, eager)
        assert ours.floor == "reference"
        assert eager.speedup == 1.0
        assert ours.speedup == pytest.approx(eager.median_ms / ours.median_ms)
        assert ours.gigabytes_per_second == pytest.approx(ours.necessary_bytes / ours.median_ms / 1e6)
        assert ours.share_of_copy == pytest.approx(ours.gigabytes_per_second / ours.copy_gigabytes_per_second)
        assert ours.necessary_bytes == eager.necessary_bytes == compiled.necessary_bytes
        assert compiled.gate == "NOT RUN"
        assert "--compile-minutes 0" in compiled.problem
    assert {row.op for row in result.rows} == set(OPS) - set(ON_DEMAND_ON_A_CPU)
    assert result.environment.keys() >= {"commit", "dirty", "torch", "cpu"}
    assert result.settings["size"] == 64
    for text in ("of copy", "vs eager", "step_kernels (reference)", "live rows", "kernels.json"):
        assert text in printed.out
    assert table.main([str(tmp_path / "kernels.json")]) == 0
    assert "upsample_argmax" in capsys.readouterr().out
    text = (tmp_path / "kernels.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["kind"] == "kernels"


def test_selected_ops_and_another_dtype(tiny_run: Callable[..., tuple[int, KernelResult]]) -> None:
    status, result = tiny_run("--compile-minutes", "0", "--dtype", "bfloat16", "--op", "exit_head")
    assert status == 0
    assert {row.op for row in result.rows} == {"exit_head"}
    assert result.rows[0].variant.startswith("bfloat16, tokens [")


def compiled_row(tiny_run: Callable[..., tuple[int, KernelResult]], *arguments: str) -> Any:
    _, result = tiny_run("--op", "upsample_argmax", *arguments)
    return result.rows[2]


def test_what_compiles_is_timed(
    tiny_run: Callable[..., tuple[int, KernelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    row = compiled_row(tiny_run)
    assert row.gate == "PASSED"
    assert row.speedup is not None


def test_what_does_not_compile_says_so(
    tiny_run: Callable[..., tuple[int, KernelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(function: object) -> None:
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", refuse)
    row = compiled_row(tiny_run)
    assert (row.gate, row.problem) == ("NOT RUN", "torch.compile: RuntimeError: no C++ compiler")


def test_what_compiles_too_long_says_so(
    tiny_run: Callable[..., tuple[int, KernelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(function: object) -> None:
        try:
            for _ in range(6000):
                time.sleep(0.01)
        except Exception:  # what a compiler does with an error that it knows a way around
            pass

    monkeypatch.setattr(torch, "compile", endless)
    row = compiled_row(tiny_run, "--compile-minutes", "0.005")
    assert row.gate == "NOT RUN"
    assert "not compiled in what was left of --compile-minutes 0.005" in row.problem


def test_time_limit_leaves_no_alarm_behind() -> None:
    with contenders.time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(contenders.OutOfTime), contenders.time_limit(0.05):
        time.sleep(5)


def test_backend_that_cannot_run_is_a_row_and_status_1(
    tiny_run: Callable[..., tuple[int, KernelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(op: str, device: torch.device) -> str:
        raise RuntimeError("backend 'triton' was asked for, but cannot run")

    monkeypatch.setattr(contenders, "selected_backend", refuse)
    status, result = tiny_run("--op", "gather_tokens", "--compile-minutes", "0")
    assert status == 1
    assert result.rows[0].problem == "backend 'triton' was asked for, but cannot run"
    assert result.rows[1].gate == "PASSED"


def test_failed_gate_gives_status_1(
    tiny_run: Callable[..., tuple[int, KernelResult]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure.gate.Limit, "of", lambda limit, contender: 0.0)
    status, result = tiny_run("--op", "merge_tokens", "--compile-minutes", "0")
    assert status == 1
    assert result.rows[0].gate == "FAILED"
    assert result.rows[0].median_ms is None
    assert "FAILED" in capsys.readouterr().out
