"""`python -m bench model` from end to end, what it refuses, and how it keeps to its budget."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_model_cases import CPU, contender, nano_case, nano_preset, nano_settings
from torch import Tensor

from bench import table
from bench.__main__ import main
from bench.environment import REPOSITORY
from bench.kernels.schema import NOT_RUN
from bench.model import gate, machine, measure
from bench.model.gate import Answers
from bench.model.layouts import EMPTY_IMAGE, KINDS, SPREAD
from bench.model.measure import LATER, Bench
from bench.model.registry import CONTENDERS, DENSE, EXITS_EXACT, FRONT, MERGED_EXACT, NAMES, PARTS, Built, Contender
from bench.model.rows import blank_row
from bench.model.schema import TIMING_FIELDS, ModelResult
from bench.model.settings import parse
from bench.schema import FAILED, PASSED
from bench.settings import DEFAULT_OUT

NONSENSE = [
    ["--model", "huge"],
    ["--model", "tiny", "tiny"],
    ["--model"],
    ["--size", "0"],
    ["--size", "16"],
    ["--size", "100"],
    ["--size", "64", "100"],
    ["--size", "64", "64"],
    ["--size"],
    ["--batch", "0"],
    ["--batch", "2", "2"],
    ["--batch", "two"],
    ["--classes", "1"],
    ["--classes", "192"],
    ["--layout", "striped"],
    ["--contender", "the best"],
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
    ["--device", "cpu", "--profile"],
    ["surprise"],
]
NANO = ["--device", "cpu", "--model", "nano", "--size", "64", "--batch", "2", "--classes", "5", "--repeats", "2"]


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


@pytest.fixture
def nano_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, ModelResult]]:
    """Runs the command on ViT nano: exit status and result."""
    monkeypatch.setitem(machine.SIZES, "cpu", (1024, 16))

    def run(*arguments: str) -> tuple[int, ModelResult]:
        status = main(["model", *NANO, *arguments, "--out", str(tmp_path)])
        return status, ModelResult.read(tmp_path / "model.json")

    return run


@pytest.mark.parametrize("arguments", NONSENSE, ids=" ".join)
def test_nonsense_gets_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", *arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench: ")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_from_a_shell() -> None:
    command = [sys.executable, "-m", "bench", "model", "--help"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
    for text in ("--compile-minutes", "--profile", "empty-image", "exact-size"):
        assert text in finished.stdout


def test_defaults_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(["--device", "cpu"])
    assert (settings.models, settings.sizes, settings.batches, settings.classes) == (("tiny",), (256,), (2,), 21)
    assert (settings.dtype, settings.out, settings.minutes, settings.repeats) == ("float32", DEFAULT_OUT, 0.8, None)
    assert (settings.layouts, settings.contenders, settings.inputs) == (KINDS, NAMES, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = parse([])
    assert (settings.device, settings.models, settings.sizes, settings.batches) == (
        "cuda",
        ("large",),
        (1024,),
        (8, 1, 32),
    )
    assert (settings.classes, settings.dtype, settings.inputs) == (150, "bfloat16", 8)
    assert parse(["--profile"]).profile
    assert parse(["--repeats", "3"]).minutes is None
    chosen = parse(["--contender", PARTS, "--contender", DENSE, "--layout", EMPTY_IMAGE, SPREAD])
    assert (chosen.contenders, chosen.layouts) == ((DENSE, PARTS), (SPREAD, EMPTY_IMAGE))


def test_small_run_from_end_to_end(
    nano_run: Callable[..., tuple[int, ModelResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = nano_run("--layout", SPREAD, EMPTY_IMAGE)
    printed = capsys.readouterr()
    assert status == 0
    spread = {row.contender: row for row in result.rows if row.layout == SPREAD}
    assert list(spread) == list(NAMES)
    everywhere = [one.name for one in CONTENDERS if one.everywhere]
    assert [row.contender for row in result.rows if row.layout == EMPTY_IMAGE] == everywhere
    for name, row in spread.items():
        if contender(name).missing(CPU):
            assert (row.gate, row.problem, row.median_ms) == (NOT_RUN, "needs a CUDA device", None)
            continue
        assert row.gate == PASSED, row
        assert row.rounds == 2
        assert row.images_per_second == pytest.approx(2000 / row.median_ms)
        assert row.teraflops_per_second == pytest.approx(2 * row.gflops / row.median_ms)
        assert row.host_syncs is row.device_kernels is None
        assert row.peak_memory_bytes > 1000
        assert row.necessary_bytes > 1000
        assert row.achieved == pytest.approx(row.floor_ms / row.median_ms)
        assert (row.decisions_differ is None) == (row.family != "merged + exits" or name == PARTS)
        if name != FRONT:
            assert row.speedup == pytest.approx(spread[DENSE].median_ms / row.median_ms)
            assert row.realised == pytest.approx(row.speedup / row.flop_reduction)
    assert spread[DENSE].note == "not compiled: --compile-minutes 0 is used up"
    assert (spread[DENSE].variant, spread[DENSE].tokens_mean, spread[DENSE].halted_share) == ("eager", 16.0, 0.0)
    assert spread[EXITS_EXACT].halted_share > 0.3 > spread[MERGED_EXACT].halted_share == 0
    assert spread[EXITS_EXACT].gflops < spread[MERGED_EXACT].gflops
    for text in ("dense (eager)", "not run: needs a CUDA device (", "of 16 tokens", "model.json", "not measured: P1"):
        assert text in printed.out
    assert table.main([str(tmp_path / "model.json")]) == 0
    assert "merged + exits, exact (eager) | PASSED" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "model.json").read_text()
    assert result.machine.keys() == {"copy_gigabytes_per_second", "matmul_teraflops_per_second"}


def test_what_compiles_is_named(
    nano_run: Callable[..., tuple[int, ModelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def compiler(function: Any, mode: str | None = None, dynamic: bool | None = None) -> Any:
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    _, result = nano_run(
        "--compile-minutes", "1", "--contender", DENSE, "--contender", PARTS, "--layout", SPREAD, EMPTY_IMAGE
    )
    dense, parts, again = result.rows
    assert (dense.variant, dense.note) == ("compiled", None)
    assert dense.compile_seconds == again.compile_seconds >= 0  # compiled once
    assert parts.variant.endswith("compiled tail")
    assert modes == ["default", None]


def test_failed_gate_gives_status_1_and_no_time(
    nano_run: Callable[..., tuple[int, ModelResult]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure.gate, "excess", lambda error, allowed: 1.0)
    status, result = nano_run("--contender", DENSE, "--layout", SPREAD)
    (row,) = result.rows
    assert (status, row.gate) == (1, FAILED)
    assert all(getattr(row, name) is None for name in TIMING_FIELDS)
    assert "FAILED: error" in capsys.readouterr().out


def test_a_contender_that_raises_is_a_row() -> None:
    broken, case = Contender("broken", "dense", "ours.no_such_builder"), nano_case()
    row, built = Bench(nano_settings()).prepare(case, broken, blank_row(case, broken), Answers.of(case))
    assert (row.gate, built) == (NOT_RUN, None)
    assert row.problem.startswith("AttributeError: ")


def with_builder(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Built], Built]) -> None:
    """Lets a contender do something else than it does."""
    real = Contender.build

    def build(one: Contender, case: Any) -> Built:
        built = real(one, case)
        return change(built) if one.name == name else built

    monkeypatch.setattr(Contender, "build", build)


def test_right_before_the_clock_and_wrong_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    case = nano_case()

    def lazy(built: Built) -> Built:
        def labels(number: int) -> Tensor:
            calls.append(number)
            right = built.labels(number)
            # The gate, the warm-up, the clock, the input that is turned over; then the gate again.
            return right if len(calls) <= gate.INPUTS + 1 + 2 + 1 else (right + 1) % case.settings.classes

        return dataclasses.replace(built, labels=labels)

    with_builder(monkeypatch, MERGED_EXACT, lazy)
    bench = Bench(nano_settings(contenders=(DENSE, MERGED_EXACT)))
    dense, wrong = bench.measure(case, float("inf"))
    assert (dense.gate, wrong.gate, wrong.problem) == (PASSED, FAILED, LATER)
    assert wrong.speedup is wrong.median_ms is None


def test_result_is_json_with_its_kind(nano_run: Callable[..., tuple[int, ModelResult]], tmp_path: Path) -> None:
    nano_run("--contender", FRONT, "--layout", SPREAD)
    data = json.loads((tmp_path / "model.json").read_text())
    assert (data["kind"], data["settings"]["batches"], data["rows"][0]["speedup"]) == ("model", [2], None)
