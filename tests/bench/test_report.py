"""Tables, goals and documents from rows; what was not measured says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.goals import GOALS, Goal
from bench.result import FAILED, LATER, PASSED, SPEEDUP, Row, Run
from step_kernels_cli import UsageError

WHERE = {"device": "a CPU", "cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.13", "clean": True}
WHERE |= {"commit": "0123456789abcdef", "date": "2026-01-02T03:04:05Z"}
SHAPE = {"vit": "small", "size": 512, "batch": 4}
FACTS = {"tokens_mean": 409.6, "tokens_min": 200, "tokens_max": 700, "halted_share": 0.4}


def row(contender: str, ms: float | None, **more: Any) -> Row:
    values = {
        "case": "photographs",
        "shape": SHAPE,
        "device": "cpu",
        "dtype": "float32",
        "gate": PASSED,
        "gflops": 120.0,
    }
    values |= {"median_ms": ms, "p20_ms": ms and 0.9 * ms, "p80_ms": ms and 1.1 * ms, "facts": FACTS}
    return Row(**{"contender": contender, **values, **more})


def main_run(**more: Any) -> Run:
    rows = [
        row(
            "dense",
            600.0,
            facts={**FACTS, "tokens_mean": 1024, "tokens_min": 1024, "tokens_max": 1024, "halted_share": 0.0},
        ),
        row("merged", 200.0, gflops=40.0, ours=True, note="layouts given"),
        row("merged + exits", 150.0, gflops=30.0, ours=True),
    ]
    values = {
        "command": "python -m bench main --policy given",
        "environment": WHERE,
        "rows": rows,
        "notes": ("a note",),
    }
    return Run(**{**values, **more})


def cells(text: str, contender: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {contender} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_row_of_a_whole_model() -> None:
    text = report.document(main_run())
    assert text.startswith("a CPU, cores: 2, threads: 2, torch 2.13, commit 0123456789, 2026-01-02:")
    assert "**photographs**, vit small, size 512, batch 4, float32, cpu:" in text and text.endswith("- a note")
    assert cells(text, "merged") == [
        *["merged", "passed", "410 (200 - 700)", "40%", "10", "200 (180 - 220)", "20"],
        *["3.00x", "3.00x", "1", "layouts given"],
    ]
    assert cells(text, "dense")[2:4] == ["1024", "0%"]


def test_row_of_an_op() -> None:
    shape = {"images": 8, "D": 1024}
    values = {"case": "merge", "shape": shape, "facts": {}, "gflops": 50.0, "gbytes": 0.1}
    rows = [
        row("step_kernels", 1.0, ours=True, peak_bytes=2_000_000, syncs=0, **values),
        row("PyTorch", 2.0, **values),
        row("copy", 0.5, **values),
    ]
    text = report.tables(rows)
    assert cells(text, "contender") == [
        *[
            "contender",
            "gate",
            "ms (p20 - p80)",
            "speed-up",
            "GFLOP/s",
            "GB/s",
            "of copy",
            "peak MB",
            "syncs",
        ]
    ]
    assert cells(text, "step_kernels")[3:] == ["2.00x", "50000", "100", "50%", "2", "0"]
    assert cells(text, "copy")[3] == "", "a copy computes nothing, so it is no faster"


def test_sizes_of_an_op_share_a_table_and_have_baselines_of_their_own() -> None:
    rows = [
        row(name, ms, case="linear", shape={"N": 64, "rows": rows}, ours=ours, facts={})
        for rows, times in ((16, (1.0, 2.0)), (32, (1.0, 3.0)))
        for name, ms, ours in (("step_kernels", times[0], True), ("PyTorch", times[1], False))
    ]
    text = report.tables(rows)
    assert text.count("contender") == 1 and "**linear**, N 64" in text
    lines = [line.split("|")[1:6] for line in text.splitlines() if "step_kernels" in line]
    assert [(line[0].strip(), line[4].strip()) for line in lines] == [("16", "2.00x"), ("32", "3.00x")]


@pytest.mark.parametrize("gate", [FAILED, LATER])
def test_who_failed_has_no_number_but_the_error(gate: str) -> None:
    failed = row("merged", None, gate=gate, error=0.5, allowed=0.25, gflops=40.0)
    text = report.tables([row("dense", 600.0), failed])
    assert cells(text, "merged")[-1] == "error 0.5 where 0.25 is allowed" and cells(text, "merged")[1] == gate
    assert not any("x" in cell for cell in cells(text, "merged")[4:-1])
    infinite = report.tables([row("dense", 600.0), dataclasses.replace(failed, error=None)])
    assert "error not finite" in infinite


def test_nobody_is_faster_than_a_baseline_that_failed() -> None:
    rows = [
        row("dense", None, gate=FAILED, error=1.0, allowed=0.5),
        row("other", 300.0),
        row("merged", 200.0, ours=True),
    ]
    assert "x |" not in report.tables(rows)


def test_who_computes_something_else_has_no_speed_up() -> None:
    text = report.tables([row("dense", 600.0), row("ToMe", 200.0, facts={SPEEDUP: "computes something else"})])
    assert "computes something else" in cells(text, "ToMe") and "3.00x" not in text


def test_raising_under_the_clock_is_told() -> None:
    text = report.tables([row("dense", 600.0), row("merged", None, problem="RuntimeError: tired | spent")])
    assert cells(text, "merged")[-1] == "RuntimeError: tired / spent"


def test_what_could_not_run_is_below_the_table_once_for_each_reason() -> None:
    missing = [row(name, None, gate="NOT RUN", problem="needs a CUDA device") for name in ("graph", "static")]
    text = report.tables([row("dense", 600.0), *missing])
    assert text.endswith("- graph; static: NOT RUN, needs a CUDA device")
    assert "contender" not in report.tables(missing)


def measured(runs: list[Run], part: str) -> list[str]:
    return [goal.measured(runs) for goal in GOALS if part in goal.what]


def test_goals_of_the_main_job_count_at_their_settings_alone() -> None:
    part = "layouts given"
    assert measured([main_run()], part) == ["1 (0.818 - 1.22)", "1 (0.818 - 1.22)"]
    assert [(goal.goal, goal.aim) for goal in GOALS if part in goal.what] == [(0.93, 0.97), (0.90, 0.95)]
    for other in (
        main_run(command="python -m bench main --policy variance"),
        main_run(command="python -m bench main --policy given --images FOLDER"),
        main_run(environment={**WHERE, "cores": 8}),
        main_run(rows=[dataclasses.replace(one, dtype="bfloat16") for one in main_run().rows]),
        main_run(rows=[dataclasses.replace(one, shape={**SHAPE, "batch": 8}) for one in main_run().rows]),
    ):
        assert measured([other], part) == ["not measured"] * 2
    assert set(measured([], "")) == {"not measured"}


def test_goal_says_why_it_was_not_measured() -> None:
    rows = [row("dense", 600.0), row("merged", None, gate="NOT RUN", problem="no memory")]
    assert measured([main_run(rows=rows)], "layouts given")[0] == "not measured: merged: no memory"


def test_worst_comparison_decides_and_a_rival_that_failed_hides_nothing() -> None:
    goal = Goal("", 1.0, 1.2, ["linear"], ["a", "b"], ["ours"], {"N": 64})

    def at(rows: int, a: float, b: float | None, ours: float, **more: Any) -> list[Row]:
        shape = {"N": 64, "rows": rows}
        found = [row(name, ms, case="linear", shape=shape) for name, ms in (("a", a), ("ours", ours))]
        return [*found, row("b", b, case="linear", shape=shape, **more)]

    run = main_run(rows=[*at(16, 4.0, 3.0, 1.0), *at(32, 2.0, 5.0, 1.0)])
    assert goal.measured([run]).startswith("2 ")
    assert dataclasses.replace(goal, at_most=True).measured([run]).startswith("3 ")
    failed = main_run(rows=at(16, 4.0, None, 1.0, gate=FAILED))
    assert goal.measured([failed]) == "not measured: b: FAILED"
    absent = main_run(rows=at(16, 4.0, None, 1.0, gate="NOT RUN"))
    assert goal.measured([absent]).startswith("4 ")


def test_figures_of_the_paper_stand_beside_ours() -> None:
    text = report.goals_of({"main.json": main_run()})
    assert cells(text, "dCTS: fewer tokens")[1:] == ["2.5x", "not measured", "2.50x (a setting)"]
    assert cells(text, "STEP: inference speed")[1:] == ["1.7x", "not measured", "4.00x"]
    assert cells(text, "STEP: tokens halted before the last layer, up to")[3] == "40% (a setting)"
    assert cells(text, "STEP: accuracy lost, at most")[2:] == ["not measured"] * 2


def test_goals_are_sentences() -> None:
    assert len({goal.what for goal in GOALS}) == len(GOALS)


TABLE = "before\n<!-- table: here/main.json -->\nold\n<!-- end of table -->\nafter\n"
BOTH = TABLE + "<!-- goals: here -->\n<!-- end of goals -->\n"


def test_regions_are_written_anew_and_nothing_else(tmp_path: Path) -> None:
    main_run().write(tmp_path / "here" / "main.json")
    text = report.regenerated(BOTH, tmp_path)
    assert (
        text.startswith("before\n<!-- table: here/main.json -->\na CPU") and "\nafter\n" in text and "old" not in text
    )
    assert "layouts given" in text and "1 (0.818 - 1.22)" in text
    assert report.regenerated(text, tmp_path) == text


def test_missing_results_are_not_measured(tmp_path: Path) -> None:
    text = report.regenerated(BOTH, tmp_path)
    assert "main.json: not measured." in text and "Nothing measured yet" in text


@pytest.mark.parametrize("mark", ["<!-- table: here/main.json -->", "<!-- end of table -->", "<!-- goals: here -->"])
def test_lost_mark_is_an_error(tmp_path: Path, mark: str) -> None:
    with pytest.raises(ValueError, match="a start and an end of every region"):
        report.regenerated(BOTH.replace(mark, ""), tmp_path)


def test_command_refuses_to_mix(tmp_path: Path) -> None:
    main_run().write(tmp_path / "main.json")
    main_run(environment={**WHERE, "cores": 4}).write(tmp_path / "model.json")
    with pytest.raises(UsageError, match="different machines"):
        report.command([tmp_path], [])
    with pytest.raises(ValueError, match="different machines"):
        report.regenerated("<!-- goals: . -->\n<!-- end of goals -->", tmp_path)


def test_command_prints_and_rewrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    main_run().write(tmp_path / "here" / "main.json")
    document = tmp_path / "page.md"
    document.write_text(BOTH, encoding="utf-8")
    assert report.command([tmp_path / "here"], [document]) == 0
    out = capsys.readouterr().out
    assert "# here" in out and "3.00x" in out
    assert document.read_text(encoding="utf-8") == report.regenerated(BOTH, tmp_path)
    assert report.command([tmp_path / "here" / "main.json"], []) == 0


def test_numbers() -> None:
    assert [report.number(value) for value in (None, 0, 3, 0.12345, 12.345, 123.4, 0.00012, 0.0)] == [
        *["", "0", "3", "0.123", "12.3", "123", "1.2e-04", "0"]
    ]


def test_without_paths_every_committed_machine_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the results of other commands, which are no folders of bench."""
    assert report.command([], []) == 0
    shown = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert shown and shown == sorted(
        {file.parent.name for file in report.LATEST.parent.glob("*/main.json")} - {"latest"}
    )
