"""`python -m bench peers` from end to end, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench_model_cases import CPU, nano_preset
from bench_peer_cases import peer

from bench import table
from bench.__main__ import main
from bench.environment import REPOSITORY
from bench.kernels.schema import NOT_RUN
from bench.model import machine, measure
from bench.model.layouts import QUOTA, SPREAD
from bench.model.measure import Task
from bench.model.registry import DENSE, EXITS_EXACT
from bench.model.schema import TIMING_FIELDS, ModelResult
from bench.peers.measure import PeerBench
from bench.peers.registry import CTS, CTS_SDPA, DTOP, NAMES, OURS_EXITS_EXACT, STEP_SDPA, TOME
from bench.peers.settings import KINDS, parse
from bench.schema import FAILED, PASSED

NONSENSE = [
    ["--layout", "fixed"],
    ["--layout"],
    ["--contender", "grouped"],
    ["--model", "huge"],
    ["--size", "100"],
    ["--batch", "0"],
    ["--classes", "192"],
    ["--seed", "-1"],
    ["--minutes", "1", "--repeats", "2"],
    ["--repeats", "0"],
    ["--device", "toaster"],
    ["--device", "cpu", "--profile"],
    ["surprise"],
    ["--layout", QUOTA, "--surprise"],
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
    monkeypatch.setitem(sys.modules, "tome", None)  # type: ignore[arg-type]  # where it is installed, too
    monkeypatch.delitem(sys.modules, "tome.patch", raising=False)

    def run(*arguments: str) -> tuple[int, ModelResult]:
        status = main(["peers", *NANO, *arguments, "--out", str(tmp_path)])
        return status, ModelResult.read(tmp_path / "peers.json")

    return run


@pytest.mark.parametrize("arguments", NONSENSE, ids=" ".join)
def test_nonsense_gets_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["peers", *arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench: ")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_from_a_shell() -> None:
    command = [sys.executable, "-m", "bench", "peers", "--help"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
    for text in ("dCTS + DToP", "quota", "bench model --help"):
        assert text in finished.stdout


def test_options_are_those_of_bench_model_and_two_of_its_own() -> None:
    settings = parse(["--model", "tiny", "--layout", SPREAD, "--seed", "3", "--contender", CTS, "--contender", DENSE])
    assert (settings.layouts, settings.contenders, settings.seed) == ((SPREAD,), (DENSE, CTS), 3)
    assert (settings.models, settings.batches, settings.minutes) == (("tiny",), (2,), 0.8)
    default = parse(["--device", "cpu", "--repeats", "1"])
    assert (default.layouts, default.contenders, default.minutes) == (KINDS, NAMES, None)
    assert default.as_json()["layouts"] == list(KINDS)


def test_every_batch_size_gets_every_kind() -> None:
    tasks = PeerBench(
        parse(["--device", "cpu", "--model", "nano", "tiny", "--classes", "5", "--batch", "8", "1"])
    ).tasks()
    assert tasks[:4] == [Task("nano", batch, kind) for batch in (8, 1) for kind in KINDS]
    assert len(tasks) == 8


def test_small_run_from_end_to_end(
    nano_run: Callable[..., tuple[int, ModelResult]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = nano_run()
    printed = capsys.readouterr().out
    assert status == 0
    rows = {(row.layout, row.contender): row for row in result.rows}
    assert list(rows) == [(kind, name) for kind in KINDS for name in NAMES]
    for (kind, name), row in rows.items():
        if peer(name).missing(CPU):
            assert (row.gate, row.problem) == (NOT_RUN, "needs a CUDA device")
        elif kind == SPREAD and name.startswith("CTS"):
            assert row.gate == NOT_RUN and row.problem.startswith("needs the same number of tokens in every image")
        elif name == TOME:
            assert row.gate == NOT_RUN and row.problem.startswith("needs timm and ToMe's own package")
        else:
            assert row.gate == PASSED, row
            assert row.speedup == pytest.approx(rows[kind, DENSE].median_ms / row.median_ms)
    assert rows[QUOTA, CTS].tokens_min == rows[QUOTA, CTS].tokens_max == 10
    assert rows[QUOTA, CTS].gflops == rows[QUOTA, CTS_SDPA].gflops
    assert rows[SPREAD, STEP_SDPA].gflops == rows[SPREAD, EXITS_EXACT].gflops
    assert rows[SPREAD, DTOP].gflops == rows[SPREAD, OURS_EXITS_EXACT].gflops
    assert (rows[SPREAD, DTOP].tokens_mean, rows[SPREAD, DTOP].family) == (16, "exits")
    for text in (
        "float32, quota layouts: 10 of 16 tokens an image",
        "ToMe runs in its own package",
        "github.com/facebookresearch/ToMe",
        "peers.json",
    ):
        assert text in printed


def test_the_table_of_the_file(nano_run: Callable[..., tuple[int, ModelResult]], tmp_path: Path) -> None:
    nano_run("--contender", DENSE, "--contender", CTS, "--contender", DTOP)
    shown = table.render((tmp_path / "peers.json").read_text())
    assert "| DToP (eager) | PASSED |" in shown
    assert "quota layouts: 10 of 16 tokens an image, 34% halt early:" in shown


def test_a_wrong_peer_has_no_time(
    nano_run: Callable[..., tuple[int, ModelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure.gate, "excess", lambda error, allowed: 1.0)
    status, result = nano_run("--contender", DENSE, "--contender", DTOP, "--layout", QUOTA)
    assert (status, [row.gate for row in result.rows]) == (1, [FAILED, FAILED])
    assert all(getattr(row, name) is None for row in result.rows for name in TIMING_FIELDS)
