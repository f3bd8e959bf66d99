"""Bars from made-up rows, the rows' schema, and the tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from bench_model_cases import model_row as row

from bench import table
from bench.kernels.schema import NOT_RUN
from bench.model.bars import DECIDING, MET, NOT_MEASURED, Bar, bars
from bench.model.layouts import FIXED
from bench.model.profile import profile_lines
from bench.model.registry import CONTENDERS, DENSE, DENSE_OURS, EXACT_GRAPH, EXITS_STATIC, FRONT, MERGED_STATIC
from bench.model.report import bar_lines, cells, free_lines, plain_table, problem_lines, title
from bench.model.rows import compared
from bench.model.schema import COST_FIELDS, TIMING_FIELDS, ModelResult, ModelRow
from bench.schema import FAILED


def value(rows: list[ModelRow], number: str, text: str) -> float | None:
    return the_bar(rows, number, text).value


def the_bar(rows: list[ModelRow], number: str, text: str) -> Bar:
    (found,) = [bar for bar in bars(rows) if bar.number == number and text in bar.what]
    return found


def test_nothing_is_measured_without_rows() -> None:
    made = bars([])
    assert {bar.state for bar in made} == {NOT_MEASURED}
    numbers = ["P1", "P2", "P3", "P4", "P5", "P11", "P14", "P16"]
    assert list(dict.fromkeys(bar.number for bar in made)) == numbers
    assert bar_lines(made) == [f"not measured: {', '.join(numbers)}"]


@pytest.mark.parametrize(
    "weaker",
    [{"compile_seconds": None}, {"note": "not compiled: the budget is used up"}, {"dtype": "float32"}],
    ids=str,
)
def test_bars_are_against_a_compiled_dense_model_in_bfloat16(weaker: dict[str, Any]) -> None:
    rows = [row(DENSE, 60.0), row(MERGED_STATIC, 20.0)]
    assert value(rows, "P1", "B=8") == pytest.approx(3.0)
    assert value([dataclasses.replace(rows[0], **weaker), rows[1]], "P1", "B=8") is None


def test_ratios() -> None:
    rows = [row(DENSE, 60.0), row(MERGED_STATIC, 20.0), row(EXITS_STATIC, 16.0), row(DENSE_OURS, 64.0)]
    rows += [row(FRONT, 1.5), row(EXACT_GRAPH, 15.0), row(DENSE, 9.0, batch=1), row(MERGED_STATIC, 4.0, batch=1)]
    assert value(rows, "P1", "B=8") == pytest.approx(3.0)
    assert value(rows, "P1", "B=1") == pytest.approx(2.25)
    assert value(rows, "P2", "B=8") == pytest.approx(3.75)
    assert value(rows, "P2", "B=1") is value(rows, "P1", "B=32") is None
    assert value(rows, "P3", "B=8") == pytest.approx(1.25)
    assert value(rows, "P4", "dense, B=8") == pytest.approx(3.75 / 4)
    assert value(rows, "P4", "our kernels, B=8") == pytest.approx(4.0 / 4)
    assert value(rows, "P11", "B=8") == pytest.approx(1.5 / 60)
    assert value(rows, "P14", "B=8") == pytest.approx(15 / 16)
    assert value(rows, "P5", "ViT-B") is None
    small = [row(DENSE, 6.0, model="small"), row(MERGED_STATIC, 4.0, model="small")]
    assert value([*rows, *small], "P5", "ViT-S") == pytest.approx(1.5)
    assert value(rows, "P16", "B=8") is None
    memory = [row(DENSE, 60.0, peak_memory_bytes=1000), row(EXITS_STATIC, 16.0, peak_memory_bytes=800)]
    assert value(memory, "P16", "B=8") == pytest.approx(0.8)


@pytest.mark.parametrize(
    "changes", [{"layout": FIXED}, {"size": 512}, {"device": "cpu"}, {"model": "base"}, {"batch": 4}]
)
def test_rows_of_other_conditions_do_not_count(changes: dict[str, Any]) -> None:
    assert value([row(DENSE, 60.0), row(MERGED_STATIC, 20.0, **changes)], "P1", "B=8") is None
    assert value([row(DENSE, 60.0, **changes), row(MERGED_STATIC, 20.0)], "P1", "B=8") is None


def test_every_contender_that_decides_a_bar_is_named() -> None:
    """Without its rows some bar is not measured; without the others', none is lost."""
    costs = {"host_syncs": 0, "peak_memory_bytes": 5}
    names = [one.name for one in CONTENDERS]
    sizes = [("large", 1), ("large", 8), ("large", 32), ("base", 8), ("small", 8)]
    rows = [row(name, 5.0, batch, model=model, **costs) for name in names for model, batch in sizes]
    assert NOT_MEASURED not in {bar.state for bar in bars(rows)}
    for name in names:
        states = {bar.state for bar in bars([one for one in rows if one.contender != name])}
        assert (NOT_MEASURED in states) == (name in DECIDING), name


def test_states() -> None:
    assert Bar("P1", "", 2.0, 2.3, 2.0).state == MET
    assert Bar("P1", "", 2.0, 2.3, 1.5).state == "missed by 25.0%"
    assert Bar("P16", "", 1.0, 0.7, 1.0, at_most=True).state == MET
    assert Bar("P16", "", 1.0, 0.7, 1.2, at_most=True).state == "missed by 20.0%"
    assert Bar("P16", "", 1.0, 0.7, None, at_most=True).state == NOT_MEASURED


def test_the_spread_of_a_ratio_is_that_of_both_times() -> None:
    wide = {"p20_ms": 54.0, "p80_ms": 66.0}
    rows = [row(DENSE, 60.0, **wide), row(EXITS_STATIC, 16.0, p20_ms=15.0, p80_ms=18.0), row(FRONT, 2.0)]
    assert the_bar(rows, "P2", "B=8").spread == pytest.approx((54 / 18, 66 / 15))
    assert the_bar(rows, "P4", "dense, B=8").spread == pytest.approx((54 / 18 / 4, 66 / 15 / 4))
    assert the_bar(rows, "P11", "B=8").spread == pytest.approx((2 / 66, 2 / 54))
    assert the_bar(rows, "P16", "B=8").spread is the_bar(rows, "P1", "B=8").spread is None
    assert "P2 ViT-L, merged + exits vs dense, B=8: 3.75, 3 to 4.4 by p20 and p80, (bar 3, aim 3.4): met" in bar_lines(
        bars(rows)
    )
    assert Bar("P1", "", 2.0, 2.3, 2.0).spread is None


def test_why_a_bar_is_not_measured() -> None:
    lost = {**dict.fromkeys(TIMING_FIELDS), "gate": NOT_RUN, "problem": "not timed: no memory"}
    eager = row(DENSE, 60.0, compile_seconds=None, note="not compiled: --compile-minutes 3 is used up")
    rows = [eager, row(MERGED_STATIC, None, batch=1, **lost), row(EXITS_STATIC, 16.0)]
    assert the_bar(rows, "P1", "B=8").lacking == f"{DENSE}: not compiled: --compile-minutes 3 is used up"
    assert the_bar(rows, "P1", "B=1").lacking == f"{MERGED_STATIC}: not timed: no memory"
    assert the_bar(rows, "P1", "B=32").lacking is the_bar(rows, "P5", "ViT-B").lacking is None  # no rows at all
    failed = row(EXITS_STATIC, None, gate=FAILED, **dict.fromkeys(TIMING_FIELDS))
    assert the_bar([row(DENSE, 60.0), failed], "P2", "B=8").lacking == f"{EXITS_STATIC}: FAILED"
    assert the_bar([row(DENSE, 60.0), row(EXITS_STATIC, 16.0)], "P16", "B=8").lacking == "costs not measured"
    assert the_bar([row(DENSE, 60.0), row(EXITS_STATIC, 16.0)], "P2", "B=8").lacking is None


def test_a_static_graph_with_syncs_misses_its_bar() -> None:
    for syncs, state in ((0, MET), (2, "missed: 2 host syncs"), (None, "missed: host syncs not counted")):
        rows = [row(EXITS_STATIC, 16.0, host_syncs=syncs), row(EXACT_GRAPH, 16.0)]
        assert the_bar(rows, "P14", "B=8").state == state


def test_a_failed_row_gives_no_bar_and_no_speed_up() -> None:
    nothing = dict.fromkeys((*TIMING_FIELDS, *COST_FIELDS))
    wrong = row(MERGED_STATIC, None, gate=FAILED, **nothing)
    dense = row(DENSE, 60.0)
    assert value([dense, wrong], "P1", "B=8") is None
    (made,) = [compared(one, dense) for one in (wrong,)]
    assert made.speedup is made.realised is None
    assert "x" not in plain_table([made]).splitlines()[-1].replace("3.20x", "")
    assert "FAILED: error 1.0e-02 where 2.0e-02 is allowed, 0 labels differ" in problem_lines([dense, wrong])[0]


def test_compared() -> None:
    dense, fast = row(DENSE, 60.0), row(EXITS_STATIC, 20.0)
    made = compared(fast, dense)
    assert (made.speedup, made.flop_reduction, made.realised) == (3.0, 4.0, 0.75)
    assert compared(dense, dense).speedup == 1.0
    part = compared(row(FRONT, 1.0), dense)
    assert part.speedup is part.flop_reduction is part.realised is None
    assert compared(fast, None).speedup is None
    assert compared(fast, row(DENSE, None)).flop_reduction == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "striped"}, "layout: expected one of"),
        ({"gate": "MAYBE"}, "gate: expected one of"),
        ({"family": "sparse"}, "family: expected one of"),
        ({"median_ms": 0.0}, "median_ms: expected a positive"),
        ({"peak_memory_bytes": -1}, "peak_memory_bytes: expected no negative"),
        ({"compile_seconds": -1.0}, "compile_seconds: expected no negative"),
        ({"halted_share": 1.5}, "halted_share: expected a share"),
        ({"gate": NOT_RUN}, "problem: a row that was NOT RUN must say why"),
        ({"gate": FAILED}, "rounds: a row with the gate FAILED must not carry one"),
        ({"problem": "hm"}, "problem: a row that PASSED must have none"),
        ({"median_ms": float("nan")}, "median_ms: expected a finite number"),
    ],
)
def test_impossible_rows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(DENSE, 60.0, **changes)
    with pytest.raises(TypeError, match="host_syncs"):
        row(DENSE, 60.0, host_syncs="none")


def test_costs_of_a_failed_row_are_refused() -> None:
    nothing = dict.fromkeys(TIMING_FIELDS)
    with pytest.raises(ValueError, match="peak_memory_bytes: a row with the gate FAILED"):
        row(DENSE, None, gate=FAILED, peak_memory_bytes=5, **nothing)


def result(*rows: ModelRow) -> ModelResult:
    environment = {"gpu": "NVIDIA Test", "cpu": None, "threads": 2, "torch": "2", "commit": "c" * 40, "dirty": False}
    environment["date"] = "2026-01-02T03:04:05Z"
    return ModelResult(rows, environment, {"size": 1024}, ("a note",), {"copy": 1.5}, {"dense": {"linears": 2.0}})


def test_free_runs_are_reported_beside() -> None:
    rows = [row(EXITS_STATIC, 20.0, decisions_differ=share) for share in (0.0, 0.002)] + [row(DENSE, 60.0)]
    (line,) = free_lines(rows)
    assert line.endswith("at most: merged + exits, static 0.200%")
    assert free_lines(rows[2:]) == []
    with pytest.raises(ValueError, match="decisions_differ: expected a share"):
        row(EXITS_STATIC, 20.0, decisions_differ=1.5)


def test_share_of_the_floor_is_a_column() -> None:
    assert "25%" in cells(row(EXITS_STATIC, 20.0, floor_ms=5.0, achieved=0.25))


def test_json_round_trip() -> None:
    made = result(row(DENSE, 60.0, variant="compiled"), row(EXITS_STATIC, 20.0, host_syncs=0, note="hm"))
    assert ModelResult.from_json(made.to_json()) == made
    data = json.loads(made.to_json())
    assert data["kind"] == "model"
    for change, message in (
        ({"kind": "kernels"}, "kind: expected 'model'"),
        ({"schema_version": 0}, "schema_version"),
        ({"machine": []}, "machine: expected dict"),
        ({"extra": 1}, "unknown key 'extra'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ModelResult.from_json(json.dumps({**data, **change}))
    del data["rows"][0]["host_syncs"]
    with pytest.raises(ValueError, match="expected the key 'host_syncs'"):
        ModelResult.from_json(json.dumps(data))


def test_an_interrupt_while_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.json"
    result(row(DENSE, 60.0)).write(path)
    real = Path.write_text

    def half(own: Path, text: str, **options: Any) -> int:
        real(own, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        result(row(DENSE, 50.0)).write(path)
    assert ModelResult.read(path).rows[0].median_ms == 60.0
    assert list(tmp_path.iterdir()) == [path]


def test_tables() -> None:
    rows = [row(DENSE, 60.0), row(EXITS_STATIC, 20.0, host_syncs=0, peak_memory_bytes=5_000_000, device_kernels=410)]
    rows = [compared(one, rows[0]) for one in rows]
    lost = row(FRONT, None, gate=NOT_RUN, problem="needs luck", rounds=None)
    elsewhere = row(FRONT, 1.0, batch=1)
    made = result(*rows, lost, elsewhere)
    markdown = table.render(made.to_json())
    for text in (
        "NVIDIA Test",
        "3.00x",
        "0.75",
        "| 5 | 0 | 410 |",
        "1638 (700 to 2500) of 4096 tokens",
        "40% halt early",
    ):
        assert text in markdown, text
    assert "- not run: needs luck (policy + layout + merge at batch 8 spread)" in markdown
    assert "linears 2 ms (100%)" in markdown
    assert "linears 2 ms (100%)" in profile_lines(made.profile)[0]
    text = plain_table(made.rows)
    assert text.count("[ViT large") == 2
    assert "policy + layout + merge" not in text.split("[ViT large")[1]
    assert title(rows) in text
    assert cells(rows[1])[0] == EXITS_STATIC
    several = [*rows, lost, dataclasses.replace(row(FRONT, 1.0), size=512), row(FRONT, 1.0, model="base")]
    assert problem_lines(several) == [
        "not run: needs luck (policy + layout + merge at ViT large 1024 px batch 8 spread)"
    ]
    assert plain_table(several).count("[ViT large, ") == 2
