"""What `python -m bench suite` sums up: tests, bars, and those that there was no time for; nothing that is private or of an earlier run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from bench_model_cases import model_row as row

from bench import environment
from bench.evidence.bars import all_bars
from bench.evidence.results import Evidence
from bench.kernels import schema
from bench.model.measure import USED_UP
from bench.model.registry import DENSE, EXITS_STATIC, MERGED_STATIC
from bench.model.schema import ModelResult, ModelRow
from bench.suite import job, summary
from bench.suite.job import CUT_SHORT, FAILED, FINISHED, NOT_RUN, Outcome
from bench.suite.parts import CPU_PARTS, GPU_PARTS
from bench.suite.settings import SuiteSettings

COMMITTED = environment.REPOSITORY / "bench" / "results" / "cpu-2-cores" / "bench.json"


def test_the_summary_holds_the_bars_and_nothing_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.json").write_text("left by an earlier run", encoding="utf-8")

    def finished(command: list[str], seconds: float) -> int:
        if "bench.suite.gpu_tests" in command:
            assert not {"bench.json", "summary.md"} & {path.name for path in tmp_path.iterdir()}
            write_counts(tmp_path, failures=["tests.gpu::test_x"])
            return 1
        (tmp_path / "bench.json").write_text(COMMITTED.read_text(encoding="utf-8"), encoding="utf-8")
        return 0

    (tmp_path / "summary.md").write_text("left by an earlier run", encoding="utf-8")
    monkeypatch.setattr(job, "launch", finished)
    assert job.main(SuiteSettings("cpu", tmp_path, 10.0, (GPU_PARTS[0], CPU_PARTS[0]))) == 1
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    for line in ("- gpu tests: FAILED", "3 passed, 1 failed, 0 skipped", "FAILED tests.gpu::test_x", "| P15 |"):
        assert line in text
    assert "P1 - P14, P16" in text and "2.6x" in text
    written = (tmp_path / "suite.json").read_text(encoding="utf-8") + text
    assert str(tmp_path) not in written and str(environment.REPOSITORY) not in written
    assert json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))["parts"][0]["state"] == FAILED
    assert not (tmp_path / "model.json").exists()
    assert "results: " in capsys.readouterr().out


def write_counts(folder: Path, **changes: Any) -> None:
    counts = {"passed": 3, "failed": 1, "skipped": 0, "seconds": 1.0, "complete": True, "failures": ["a"], **changes}
    (folder / "gpu-tests.json").write_text(json.dumps(counts), encoding="utf-8")


def test_tests_of_an_earlier_run_are_not_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_counts(tmp_path)
    monkeypatch.setattr(job, "launch", lambda command, seconds: 0)
    assert job.main(SuiteSettings("cpu", tmp_path, 10.0, CPU_PARTS[1:2])) == 0
    assert "tests:" not in (tmp_path / "summary.md").read_text(encoding="utf-8")
    for broken in ("{", "[]"):
        (tmp_path / "gpu-tests.json").write_text(broken, encoding="utf-8")
        assert summary.test_counts(tmp_path) is None


def test_a_summary_without_results_names_no_path(tmp_path: Path) -> None:
    text = summary.summed_up(tmp_path, (), (), 9.0)
    assert "No results: the folder holds no results" in text and str(tmp_path) not in text
    (tmp_path / "model.json").write_text("{", encoding="utf-8")
    text = summary.summed_up(tmp_path, (), (), 9.0)
    assert "No results: the folder/model.json is not a result" in text and str(tmp_path) not in text


def model_result(*rows: ModelRow, notes: tuple[str, ...] = ()) -> Evidence:
    return Evidence("made up", model=ModelResult(rows, {}, {}, notes))


def short(evidence: Evidence | None, state: str = FINISHED, problem: str | None = None, part: int = 1) -> set[str]:
    found = summary.without_time(GPU_PARTS[part : part + 1], [Outcome("part", state, 1.0, problem)], evidence)
    return {f"{bar.number} {bar.what}" for bar in found}


def test_bars_that_there_was_no_time_for_are_named() -> None:
    dense, merged, exits = row(DENSE, 60.0), row(MERGED_STATIC, 20.0), row(EXITS_STATIC, 16.0)
    budget = "not compiled: --compile-minutes 3 is used up"
    eager = dataclasses.replace(dense, compile_seconds=None, note=budget)
    assert short(model_result(dense, merged)) == set()  # others were not asked for, or cannot run here
    found = short(model_result(eager, merged, exits))
    assert "P1 ViT-L, merged vs dense, B=8" in found and "P16 ViT-L, peak memory, exits on vs dense, B=8" in found
    assert not any(" B=1" in what or "vs off" in what for what in found)
    left_out = f"left out, {USED_UP}: ViT large, 1024 px, batch 32, spread layouts"
    assert "P1 ViT-L, merged vs dense, B=32" in short(model_result(dense, merged, notes=(left_out,)))
    without = dataclasses.replace(row(MERGED_STATIC, None), gate=schema.NOT_RUN, problem="needs luck", rounds=None)
    assert "P1 ViT-L, merged vs dense, B=8" not in short(model_result(dense, without), CUT_SHORT, USED_UP)
    everything = short(None, NOT_RUN, USED_UP)
    assert {what.split()[0] for what in everything} == set(GPU_PARTS[1].bars)
    assert short(None, NOT_RUN, "interrupted") == short(None, FAILED, "exit status 1") == set()
    assert {what.split()[0] for what in short(None, CUT_SHORT, USED_UP, part=2)} == set(GPU_PARTS[2].bars)


def test_every_bar_of_a_gpu_is_of_one_part() -> None:
    numbers = [number for part in (*GPU_PARTS, CPU_PARTS[0]) for number in part.bars]
    assert sorted(numbers) == sorted({bar.number for bar in all_bars(Evidence("empty"))})


def test_the_summary_says_how_to_measure_the_rest(tmp_path: Path) -> None:
    outcomes = [Outcome("model", NOT_RUN, 0.0, USED_UP)]
    for minutes, more in ((9.0, "30"), (40.0, "80")):
        text = summary.summed_up(tmp_path, GPU_PARTS[1:2], outcomes, minutes)
        assert "bars not measured for lack of time: P1 ViT-L, merged vs dense, B=1; " in text
        assert f"`python -m bench suite --minutes {more}` has time for them" in text
