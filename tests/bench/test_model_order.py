"""The comparisons of `bench model`: which come first, what they share, and what happens to those that there is no time or memory for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_model_cases import CPU, nano_case, nano_preset, nano_settings

from bench.__main__ import main
from bench.compiling import CompileBudget
from bench.errors import UsageError
from bench.kernels.schema import NOT_RUN
from bench.model import gate, machine, measure
from bench.model.budget import Budget, Task, at_every_size, baselines_of, tasks_of
from bench.model.layouts import EMPTY_IMAGE, REALISTIC, SPREAD
from bench.model.measure import NOT_REACHED, SHARE_USED_UP, USED_UP, Bench
from bench.model.registry import CONTENDERS, DENSE, EXITS_EXACT, EXITS_STATIC_EAGER, FRONT, MERGED_EXACT, PARTS
from bench.model.report import left_out_lines, markdown_table
from bench.model.schema import ModelResult, ModelRow
from bench.model.settings import parse
from bench.peers.measure import PeerBench
from bench.peers.settings import parse as parse_peers
from bench.schema import PASSED
from step_kernels.model.vit import PRESETS


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


def test_the_most_important_comparisons_come_first() -> None:
    settings = nano_settings(
        models=("large", "base", "small"), batches=(8, 1, 32), sizes=(96, 64, 128), layouts=(SPREAD, REALISTIC)
    )
    tasks = tasks_of(settings)
    first = [Task("large", batch, SPREAD, 96) for batch in (8, 1, 32)] + [Task("large", 8, REALISTIC, 96)]
    others = [Task(model, 8, kind, 96) for model in ("base", "small") for kind in (SPREAD, REALISTIC)]
    sizes = [Task("large", 8, SPREAD, size, beside=True) for size in (64, 128)]
    assert tasks[:10] == [*first, *others, *sizes]
    rest = [(1, 96), (32, 96), (8, 64), (8, 128)]
    assert [(task.model, task.batch, task.size, task.beside) for task in tasks[10:]] == [
        (model, batch, size, True) for model in ("base", "small") for batch, size in rest
    ]
    assert len(set(tasks)) == len(tasks)
    assert [task.weight for task in tasks[:10]] == [3, 3, 3, 1, 3, 1, 3, 1, 1, 1]
    assert CONTENDERS[0].name == DENSE
    assert tasks_of(nano_settings(layouts=(EMPTY_IMAGE,), sizes=(64, 96))) == [Task("nano", 2, EMPTY_IMAGE, 64)]


def test_tasks_without_a_size_come_at_every_size() -> None:
    peers = PeerBench(parse_peers(["--device", "cpu", "--model", "nano", "--classes", "5", "--size", "64", "32"]))
    tasks = at_every_size(peers.tasks(), peers.settings.sizes)
    assert [task.size for task in tasks] == [64] * (len(tasks) // 2) + [32] * (len(tasks) // 2)
    assert len({(task.batch, task.kind) for task in tasks}) == len(tasks) // 2
    own = tasks_of(nano_settings(sizes=(64, 96)))
    assert at_every_size(own, (64, 96)) == own


def test_baselines_that_no_bar_needs_wait_for_their_turn() -> None:
    tasks = tasks_of(
        nano_settings(models=("nano", "tiny"), batches=(8, 1), sizes=(64, 96), layouts=(SPREAD, REALISTIC))
    )
    needed = {("nano", 64, 8), ("nano", 64, 1), ("tiny", 64, 8)}
    assert baselines_of(tasks) == needed
    beside = [task for task in tasks if task.beside]
    assert baselines_of(beside) == {("nano", 96, 8), ("tiny", 64, 1), ("tiny", 96, 8)}


def run_recording(monkeypatch: pytest.MonkeyPatch, bench: Bench, problem: Callable[[Any], None] = lambda case: None):
    """The cases that `bench.rows()` measures, each as (model, size, batch, kind, position embeddings, baselines to come)."""
    seen = []

    def measured(case: Any, seconds: float) -> list[ModelRow]:
        problem(case)
        cells = case.weights.vit.grid_positions(case.grid).shape[-2]
        baselines = bench.compiling.baselines_to_come
        seen.append((case.weights.name, case.size, case.batch, case.kind, cells, baselines))
        case.weights.kept["compiled", case.batch] = case.size
        bench._dense.setdefault(case.batch, gate.Answers.of(case))
        assert set(case.weights.kept.values()) == {case.size}
        return [measure.blank_row(case, next(one for one in bench.contenders if one.name == DENSE))]

    monkeypatch.setattr(bench, "measure", measured)
    return bench.rows(), seen


def test_each_model_at_each_size_has_weights_and_compiled_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano2", {**PRESETS["nano"], "depth": 6})
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    settings = nano_settings(models=("nano", "nano2"), sizes=(64, 96), batches=(2, 1), layouts=(SPREAD, EMPTY_IMAGE))
    rows, seen = run_recording(monkeypatch, Bench(settings))
    assert seen == [
        ("nano", 64, 2, SPREAD, 16, 3),
        ("nano", 64, 1, SPREAD, 16, 2),
        ("nano", 64, 2, EMPTY_IMAGE, 16, 1),  # its dense model is compiled
        ("nano2", 64, 2, SPREAD, 16, 1),
        ("nano2", 64, 2, EMPTY_IMAGE, 16, 0),
        ("nano", 96, 2, SPREAD, 36, 3),
        ("nano2", 64, 1, SPREAD, 16, 2),
        ("nano2", 96, 2, SPREAD, 36, 1),
    ]
    assert len(resets) == 4  # whenever model or size changes
    assert [(row.model, row.size, row.batch) for row in rows] == [found[:3] for found in seen]


def test_no_memory_for_one_comparison_costs_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(case: Any) -> None:
        if case.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    bench = Bench(nano_settings(batches=(2, 1), layouts=(SPREAD,)))
    finished = []
    bench.finished = lambda rows: finished.append((len(rows), [*bench.left_out.values()]))
    rows, _ = run_recording(monkeypatch, bench, full)
    problem = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert [row.batch for row in rows] == [1]
    assert bench.left_out == {Task("nano", 2, SPREAD, 64): problem}
    assert finished == [(0, [problem, NOT_REACHED]), (1, [problem])]
    assert left_out_lines(bench.left_out) == [f"left out, {problem}: ViT nano, 64 px, batch 2, spread layouts"]


def test_answers_of_the_dense_model_are_kept_for_other_layouts_once_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kept without having been worked out, they would be those of other inputs than the ones that are turned over."""
    real, broken = measure.gate.Truths.of, [True]

    def of(truths: Any, family: str) -> Any:
        if broken[0]:
            raise torch.OutOfMemoryError("no memory for the oracle")
        return real(truths, family)

    monkeypatch.setattr(measure.gate.Truths, "of", of)
    bench = Bench(nano_settings(contenders=(DENSE,)))
    (row,) = bench.measure(nano_case(), float("inf"))
    assert (row.gate, row.problem) == (NOT_RUN, "OutOfMemoryError: no memory for the oracle")
    broken[0] = False
    for kind in (EMPTY_IMAGE, SPREAD):  # each with inputs of its own
        (row,) = bench.measure(nano_case(kind), float("inf"))
        assert row.gate == PASSED, row


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, UsageError])
def test_a_run_without_any_comparison_is_an_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Any) -> None:
        raise error("not here")

    with pytest.raises(error, match="not here"):
        run_recording(monkeypatch, Bench(nano_settings(batches=(2, 1), layouts=(SPREAD,))), refuse)


def test_two_sizes_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(machine.SIZES, "cpu", (1024, 16))
    command = [
        "model",
        "--device",
        "cpu",
        "--model",
        "nano",
        "--classes",
        "5",
        "--size",
        "64",
        "96",
        "--batch",
        "2",
        "1",
    ]
    command += ["--repeats", "2", "--layout", SPREAD, "--contender", DENSE, "--contender", EXITS_EXACT]
    assert main([*command, "--out", str(tmp_path)]) == 0
    result = ModelResult.read(tmp_path / "model.json")
    assert [(row.size, row.batch, row.gate) for row in result.rows] == [
        (size, batch, PASSED) for size, batch in ((64, 2), (64, 2), (64, 1), (64, 1), (96, 2), (96, 2))
    ]
    assert result.settings["sizes"] == [64, 96]
    assert all(row.speedup is not None for row in result.rows)
    assert {name for name in result.profile if "96 px" in name} == {
        f"{name}, ViT nano, 96 px, batch 2" for name in (DENSE, EXITS_EXACT)
    }
    assert "dense, ViT nano, 96 px, batch 2, spread" in result.roofline
    assert "[ViT nano, 96 px, batch 2" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


def test_what_there_is_no_time_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(machine.SIZES, "cpu", (1024, 16))
    monkeypatch.setattr(Budget, "left", lambda budget: 0.0)
    command = ["model", "--device", "cpu", "--model", "nano", "--classes", "5", "--size", "64", "96", "--batch", "2"]
    assert main([*command, "--minutes", "1", "--layout", SPREAD, "--out", str(tmp_path)]) == 0
    result = ModelResult.read(tmp_path / "model.json")
    assert {(row.size, row.gate) for row in result.rows} == {(64, NOT_RUN)}
    line = f"left out, {USED_UP}: ViT nano, 96 px, batch 2, spread layouts"
    assert line in result.notes and f"- {line}" in capsys.readouterr().out
    assert f"- {line}" in markdown_table(result)


def test_budget() -> None:
    now = [100.0]
    compiling = CompileBudget(1.0, CPU)
    budget = Budget(2.0, compiling, now=lambda: now[0])
    tasks = [Task("nano", 1, SPREAD), Task("nano", 1, EMPTY_IMAGE)]
    assert budget.share(tasks) == pytest.approx(90)
    now[0], compiling.spent = 150.0, 30.0
    assert (budget.spent(), budget.left()) == (20.0, 100.0)
    assert budget.share(tasks[1:]) == 100.0
    now[0] = 900.0
    assert budget.left() == budget.share(tasks) == 0.0
    assert Budget(None, compiling).share(tasks) == float("inf")


def passed(rows: list[ModelRow]) -> set[str]:
    return {row.contender for row in rows if row.gate == PASSED}


def test_a_budget_stops_between_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first comparison builds everybody, one without time of its own the important ones, and none when nothing at all is left."""
    bench, case, left = Bench(nano_settings(repeats=None, minutes=1.0)), nano_case(), [10.0]
    monkeypatch.setattr(bench.budget, "left", lambda: left[0])
    important = {DENSE, FRONT, EXITS_EXACT, MERGED_EXACT}
    assert passed(bench.measure(case, 0.0)) == {*important, PARTS, EXITS_STATIC_EAGER}
    rows = bench.measure(case, 0.0)
    assert passed(rows) == important
    assert [row.problem for row in rows if row.contender == PARTS] == [SHARE_USED_UP]
    left[0] = 0.0
    rows = bench.measure(case, 0.0)
    assert passed(rows) == set()
    assert {row.problem for row in rows if row.contender in important} == {USED_UP}


def test_a_command_line_with_sizes() -> None:
    assert parse(["--device", "cpu", "--size", "512", "256"]).as_json()["sizes"] == [512, 256]
