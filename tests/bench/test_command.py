"""The command line: nonsense gets one line on stderr and exit status 2; defaults are what the help says."""

from __future__ import annotations

import builtins
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import case, job, table
from bench.__main__ import main
from bench.case import Case
from bench.environment import REPOSITORY
from bench.errors import UsageError
from bench.images import VIEWS, Photographs
from bench.model import machine
from bench.notes import BUSY_NOTE, busy_notes, notes_of
from bench.schema import Result
from bench.settings import DEFAULT_OUT, parse

NONSENSE = [
    ["--model", "huge"],
    ["--size", "0"],
    ["--size", "-64"],
    ["--size", "100"],
    ["--size", "big"],
    ["--batch", "0"],
    ["--batch", "two"],
    ["--policy", "magic"],
    ["--tokens", "0.5"],
    ["--tokens", "nan"],
    ["--tokens", "inf"],
    ["--policy", "quota", "--tokens", "5"],
    ["--halt", "1.5"],
    ["--halt", "-0.1"],
    ["--halt", "nan"],
    ["--exits", "0"],
    ["--exits", "13"],
    ["--exits", "8,4"],
    ["--exits", "8,8"],
    ["--exits", "eight"],
    ["--exits", ""],
    ["--seed", "-1"],
    ["--seed", "0.5"],
    ["--minutes", "0"],
    ["--minutes", "nan"],
    ["--repeats", "0"],
    ["--minutes", "1", "--repeats", "2"],
    ["--device", "toaster"],
    ["--device", "cuda:99"],
    ["--device", "meta"],
    ["--device", "cpu:3"],
    ["--device", "cpu:0"],
    ["--images", "/nowhere\nat/all"],
    ["--dtype", "int8"],
    ["--images", "/nowhere/at/all"],
    ["--size", "16384"],
    ["--flag-that-is-not-there"],
    ["surprise"],
]


@pytest.mark.parametrize("arguments", NONSENSE, ids=" ".join)
def test_nonsense_gets_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bench: ")
    assert captured.err.count("\n") == 1


def test_output_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "below")]) == 2
    assert "--out" in capsys.readouterr().err


def test_usage_error_writes_no_result(tmp_path: Path) -> None:
    assert main(["--images", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.rglob("*.json"))


def test_nonsense_from_a_shell_shows_no_traceback() -> None:
    command = [sys.executable, "-m", "bench", "--halt", "7"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == "bench: --halt expects a share between 0 and 1, got 7.0\n"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real_import = builtins.__import__

    def without_job(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "job":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_job)
    assert main([]) == 2
    assert capsys.readouterr().err == "bench: numpy is not installed: pip install '.[bench]' -c constraints.txt\n"


def test_package_that_does_not_load_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def without_job(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "job":
            raise ImportError("numpy.core failed\n\nOriginal error: no such symbol")
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_job)
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error == "bench: a package does not load: numpy.core failed Original error: no such symbol\n"


def test_defaults() -> None:
    settings = parse([])
    assert (settings.model, settings.size, settings.batch, settings.policy) == ("small", 512, None, "variance")
    assert (settings.tokens, settings.halt, settings.exits, settings.out) == (2.5, 0.4, (8,), DEFAULT_OUT)
    assert settings.dtype == ("float32" if settings.device == "cpu" else "bfloat16")
    assert parse(["--model", "large"]).exits == (16,)
    assert parse(["--exits", "none"]).exits == ()
    assert parse(["--exits", "4,8"]).exits == (4, 8)
    assert parse(["--repeats", "3"]).minutes is None


def test_help_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--policy" in capsys.readouterr().out


@pytest.fixture
def drawn_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_photographs: Photographs
) -> Callable[..., tuple[int, Path]]:
    """Runs the command on drawn pictures: exit status and output folder."""
    monkeypatch.setattr(job, "load_photographs", lambda folder, **options: drawn_photographs)
    monkeypatch.setitem(machine.SIZES, "cpu", (1024, 16))
    monkeypatch.setattr(case, "VIEWS", 2)  # quicker

    def run(*arguments: str) -> tuple[int, Path]:
        small = ["--device", "cpu", "--model", "tiny", "--size", "64", "--batch", "2", "--repeats", "2"]
        return main([*small, "--tokens", "1.6", *arguments, "--out", str(tmp_path)]), tmp_path

    return run


def test_small_run_from_end_to_end(
    drawn_run: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(case, "VIEWS", VIEWS)
    status, folder = drawn_run()
    printed = capsys.readouterr()
    assert status == 0
    result = Result.read(folder / "bench.json")
    assert [row.provider for row in result.rows] == ["dense", "merged", "merged + exits"]
    assert all(row.gate == "PASSED" for row in result.rows)
    dense, merged, exits = result.rows
    assert dense.speedup == dense.realised == 1.0
    assert dense.tokens_mean == 16
    assert merged.tokens_mean == pytest.approx(10)  # 16 / 1.6
    assert merged.halted_share == 0
    assert exits.halted_share == pytest.approx(0.4, abs=1 / 40)
    assert dense.gflops > merged.gflops > exits.gflops
    for row in result.rows:
        assert row.peak_memory_bytes > 10_000 and row.necessary_bytes > 10_000
        assert row.host_syncs is row.device_kernels is None
        assert row.achieved == pytest.approx(row.floor_ms / row.median_ms)
        floors = result.roofline[row.provider]
        assert sum(part["gigaflops"] for part in floors.values()) == pytest.approx(row.gflops * row.batch)
        assert sum(part["floor_ms"] for part in floors.values()) == pytest.approx(row.floor_ms)
        assert result.profile[row.provider]["linears"] > 0
    assert merged.realised == pytest.approx(dense.median_ms / merged.median_ms * merged.gflops / dense.gflops)
    for text in (
        "gate merged + exits: PASSED",
        "speed-up",
        "Weights are random",
        "share one output tail",
        "8 inputs rotate",
        "over all inputs 2 of the 2 positions",
        "The clock saw 2 of the 8 inputs",
        "bench.json",
    ):
        assert text in printed.out
    assert all(row.provider in printed.out for row in result.rows)
    assert "\r" not in printed.err  # no bar where there is no terminal
    assert result.settings["inputs"] == 8
    assert {row.rounds for row in result.rows} == {2}


def test_notes_say_how_many_inputs_and_images_were_seen(small_case: Callable[..., Case]) -> None:
    rotating = small_case(inputs=VIEWS)
    row = Result.read(REPOSITORY / "bench" / "results" / "cpu-2-cores" / "bench.json").rows[1]

    def notes(rounds: int | None) -> str:
        failed = dataclasses.replace(row, rounds=None)
        return "\n".join(notes_of(rotating, [failed, dataclasses.replace(row, rounds=rounds)]))

    assert "The clock saw 6 of the 8 inputs" in notes(6)
    for rounds in (None, 8, 40):
        assert "The clock saw" not in notes(rounds)
    rotating = dataclasses.replace(rotating, inputs=tuple(images.repeat(16, 1, 1, 1) for images in rotating.inputs))
    assert "over all inputs 8 of the 32 positions" in notes(8)


@pytest.mark.parametrize(
    ("device", "load", "busy"), [("cpu", 1.1, True), ("cpu", 1.0, False), ("cpu", None, False), ("cuda", 9.0, False)]
)
def test_a_busy_machine_is_called_busy(device: str, load: float | None, busy: bool) -> None:
    notes = busy_notes(device, {"load_average": load, "cores": 2})
    assert notes == (
        [f"{BUSY_NOTE} (load 1.1 before the start): times are too long, and their ratios may be others."]
        if busy
        else []
    )


def test_who_is_interrupted_after_the_clock_keeps_the_times(
    drawn_run: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "measure_costs", interrupted)
    status, folder = drawn_run("--exits", "none")
    assert status == 130
    result = Result.read(folder / "bench.json")
    assert [row.provider for row in result.rows] == ["dense", "merged"] and result.rows[1].speedup is not None
    assert result.machine == {} and result.rows[1].peak_memory_bytes is None


def test_missed_target_gets_a_note(
    drawn_run: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, folder = drawn_run("--tokens", "1e6", "--exits", "none")
    assert status == 0
    result = Result.read(folder / "bench.json")
    reached = 16 / result.rows[1].tokens_mean
    (note,) = [note for note in result.notes if "not reached" in note]
    assert note.startswith("--tokens 1e+06 was not reached")
    assert f"{reached:.3g} times fewer" in note
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("--policy", "none", "--tokens", "7")])
def test_reached_target_gets_no_note(drawn_run: Callable[..., tuple[int, Path]], arguments: tuple[str, ...]) -> None:
    _, folder = drawn_run(*arguments, "--exits", "none")
    assert not [note for note in Result.read(folder / "bench.json").notes if "not reached" in note]


def test_picture_is_written(drawn_run: Callable[..., tuple[int, Path]]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra bench")
    _, folder = drawn_run()
    with pytest.importorskip("PIL.Image").open(folder / "supertokens.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_json_names_no_person_and_no_path(drawn_run: Callable[..., tuple[int, Path]]) -> None:
    _, folder = drawn_run("--images", "/home/someone/pictures")
    text = (folder / "bench.json").read_text()
    assert "/home" not in text
    assert str(folder) not in text
    assert json.loads(text)["settings"]["images"] == "folder"


def test_missing_matplotlib_costs_the_picture_only(
    drawn_run: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, folder = drawn_run("--exits", "none")
    assert status == 0
    assert (folder / "bench.json").exists()
    assert not (folder / "supertokens.png").exists()
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out


def test_failed_gate_gives_status_1(
    drawn_run: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job.gate, "ALLOWED_OVER_PLAIN", 0.0)
    monkeypatch.setattr(job.gate, "unit_in_last_place", lambda truth, dtype: 1e-12)
    status, folder = drawn_run()
    assert status == 1
    assert {row.gate for row in Result.read(folder / "bench.json").rows} == {"FAILED"}
    assert "FAILED" in capsys.readouterr().out


def test_table_command_prints_what_report_generates(
    drawn_run: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = drawn_run()
    capsys.readouterr()
    assert table.main([str(folder / "bench.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ViT-T/16, 64 px, batch 2, float32" in lines[0]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| dense", "| merged", "| merged + exits"]
    assert len({line.count("|") for line in lines[2:]}) == 1


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_table_command_refuses_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    assert table.main([str(tmp_path / "result.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert table.main([]) == 2


def test_provider_names_are_unique() -> None:
    from bench.providers import provider

    with pytest.raises(ValueError, match="'dense'"):
        provider("dense")(lambda case: None)


def test_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"cuda:99 is not there"):
        parse(["--device", "cuda:99"])
