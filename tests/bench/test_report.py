"""`python -m bench report`: bars of every kind, the abstract's figures, plots of what was measured, machines kept apart."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.environment import REPOSITORY
from bench.evidence import bars, paper, plots, readme, speedup, text
from bench.evidence.bars import all_bars
from bench.evidence.command import committed
from bench.evidence.results import MACHINE, Evidence, read
from bench.kernels import ops_linear, plain_attention
from bench.kernels.contenders import BACKWARD, COMPILED, EAGER, FORWARD, OURS, TIGHT
from bench.kernels.schema import NOT_RUN, KernelResult, KernelRow
from bench.model.bars import NOT_MEASURED, Bar
from bench.model.layouts import SPREAD
from bench.model.registry import CONTENDERS, DENSE, EXITS_STATIC, MERGED_STATIC
from bench.model.schema import TIMING_FIELDS as TIMING_FIELDS_OF_MODELS
from bench.model.schema import ModelResult, ModelRow
from bench.schema import COST_FIELDS, FAILED, PASSED, TIMING_FIELDS, Result

COMMITTED = REPOSITORY / "bench" / "results" / "cpu-2-cores"
MAIN = Result.read(COMMITTED / "bench.json")
GPU = {**MAIN.environment, "gpu": "NVIDIA Test", "cuda": "13"}
FAMILY = {one.name: one.family for one in CONTENDERS}
KERNEL_SETTINGS = {"model": "large", "size": 1024, "batch": 8, "classes": 150, "dtype": "bfloat16"}


def kernel(op: str, contender: str, milliseconds: float | None, **changes: Any) -> KernelRow:
    values = {
        "direction": FORWARD,
        "variant": "bfloat16, 100 live rows",
        "device": "cuda",
        "dtype": "bfloat16",
        "floor": None,
        "composition": None,
        "gate": PASSED,
        "problem": None,
        "max_error": 0.0,
        "allowed_error": 1.0,
        "necessary_bytes": 1000,
    }
    return KernelRow(op=op, contender=contender, median_ms=milliseconds, **{**values, **changes})


def model(contender: str, milliseconds: float, **changes: Any) -> ModelRow:
    merged = contender != DENSE
    row = ModelRow(
        contender=contender,
        family=FAMILY[contender],
        variant=None,
        model="large",
        batch=8,
        layout=SPREAD,
        size=1024,
        device="cuda",
        dtype="bfloat16",
        tokens_mean=1638.4 if merged else 4096.0,
        tokens_min=700 if merged else 4096,
        tokens_max=4096,
        halted_share=0.4 if "exits" in contender else 0.0,
        gflops=1250.0 if merged else 4000.0,
        gate=PASSED,
        flop_reduction=3.2 if merged else 1.0,
        rounds=8,
        median_ms=milliseconds,
        p20_ms=milliseconds,
        p80_ms=milliseconds,
        compile_seconds=None if merged else 60.0,
        speedup=60.0 / milliseconds,
    )
    return dataclasses.replace(row, **changes)


def kernels(*rows: KernelRow, **settings: Any) -> Evidence:
    return Evidence("made up", kernels=KernelResult(rows, GPU, {**KERNEL_SETTINGS, **settings}))


def models(*rows: ModelRow) -> ModelResult:
    return ModelResult(rows, GPU, {}, profile={"dense, ViT large, batch 8": {"linears": 2.0, "attention": 1.0}})


def value(evidence: Evidence, number: str, what: str = "") -> float | None:
    (found,) = [bar for bar in all_bars(evidence) if bar.number == number and what in bar.what]
    return found.value


def test_every_bar_is_there_measured_or_not() -> None:
    made = all_bars(Evidence("empty"))
    assert list(dict.fromkeys(bar.number for bar in made)) == [f"P{number}" for number in range(1, 17)]
    assert {bar.state for bar in made} == {NOT_MEASURED}
    assert text.not_measured(made) == "P1 - P16"


def test_p15_is_the_main_job_under_its_conditions() -> None:
    assert value(Evidence("cpu", main=MAIN), "P15", "given, merged:") == MAIN.rows[1].realised
    assert value(Evidence("cpu", main=MAIN), "P15", "merged + exits") == MAIN.rows[2].realised
    dense, merged = MAIN.rows[:2]
    (bar,) = [
        bar for bar in all_bars(Evidence("cpu", main=MAIN)) if bar.number == "P15" and "given, merged:" in bar.what
    ]
    assert bar.spread == pytest.approx(
        (dense.p20_ms / merged.p80_ms / merged.flop_reduction, dense.p80_ms / merged.p20_ms / merged.flop_reduction)
    )
    assert bar.spread[0] < bar.value < bar.spread[1]
    for name, other in (("policy", "variance"), ("size", 1024), ("model", "base"), ("device", "cuda")):
        changed = dataclasses.replace(MAIN, settings={**MAIN.settings, name: other})
        assert value(Evidence("cpu", main=changed), "P15", "merged + exits") is None
    more_cores = dataclasses.replace(MAIN, environment={**MAIN.environment, "cores": 4})
    assert value(Evidence("cpu", main=more_cores), "P15", "merged + exits") is None


def test_attention_bars() -> None:
    varlen, (first, second, *_) = plain_attention.VARLEN, [rival.name for rival in plain_attention.DENSE]
    wide, equal = "ragged_attention_wide", "ragged_attention_equal"
    both, short, long = {"direction": BACKWARD}, {"variant": "q, 1024 an image"}, {"variant": "q, 4096 an image"}
    found = kernels(
        kernel(wide, OURS, 2.0), kernel(wide, varlen, 3.0), kernel(wide, first, 1.0),
        kernel(wide, OURS, 5.0, **both), kernel(wide, varlen, 6.0, **both),
        kernel(equal, OURS, 1.0, **short), kernel(equal, first, 0.9, **short), kernel(equal, second, 1.2, **short),
        kernel(equal, OURS, 4.0, **long), kernel(equal, second, 4.4, **long),
    )  # fmt: skip
    assert value(found, "P6") == 1.5
    assert value(found, "P7", "1k") == pytest.approx(0.9)
    assert value(found, "P7", "4k") == pytest.approx(1.1)
    assert value(found, "P8") == pytest.approx(1.2)
    assert bars.length_of(kernel(equal, OURS, 1.0, variant="q, 9 to 40 an image")) is None


def test_a_rival_that_failed_may_have_been_the_fastest() -> None:
    """Without it, the bar at that length would be about a slower one; one that cannot run is nobody's choice."""
    flash, cudnn, _, math = [rival.name for rival in plain_attention.DENSE]
    equal, short, long = "ragged_attention_equal", {"variant": "q, 1024 an image"}, {"variant": "q, 4096 an image"}
    found = kernels(
        kernel(equal, OURS, 1.0, **short), kernel(equal, flash, 1.2, **short), kernel(equal, cudnn, 1.1, **short),
        kernel(equal, OURS, 4.0, **long), kernel(equal, flash, 4.4, **long),
        kernel(equal, math, None, gate=NOT_RUN, problem="no memory", **long),
    )  # fmt: skip
    assert (value(found, "P7", "1k"), value(found, "P7", "4k")) == pytest.approx((1.1, 1.1))
    stores_all = kernel(equal, math, None, gate=FAILED, **long)
    assert value(kernels(*found.kernels.rows[:-1], stores_all), "P7", "4k") == pytest.approx(1.1)
    failed = dataclasses.replace(
        found.kernels, rows=(*found.kernels.rows, kernel(equal, cudnn, None, gate=FAILED, **long))
    )
    short_bar, long_bar = (bar for bar in all_bars(Evidence("gpu", kernels=failed)) if bar.number == "P7")
    assert (short_bar.value, short_bar.lacking) == (pytest.approx(1.1), None)
    assert (long_bar.value, long_bar.lacking) == (None, "dense SDPA, cuDNN: FAILED")


def test_the_math_backend_has_the_name_that_bars_know() -> None:
    assert bars.STORES_ALL_SCORES in [rival.name for rival in plain_attention.DENSE]


def test_what_is_lacking_is_that_of_the_same_length() -> None:
    equal, first = "ragged_attention_equal", plain_attention.DENSE[0].name
    found = kernels(kernel(equal, first, None, gate=NOT_RUN, problem="no memory", variant="q, 4096 an image"))
    lacking = [bar.lacking for bar in all_bars(found) if bar.number == "P7"]
    assert lacking == [None, f"{first}: no memory"]


def test_tail_movers_and_exit_stage() -> None:
    found = kernels(
        kernel("upsample_argmax", OURS, 1.0, extra_memory_bytes=8 * 1024 * 1024),
        kernel("upsample_argmax", COMPILED, 4.0),
        kernel("exit_head", OURS, 0.2),
        kernel("gather_tokens", OURS, 0.1),
    )
    assert value(found, "P12", "compiled") == 4.0
    assert value(found, "P12", "memory") == pytest.approx(1 / 600)
    assert value(found, "P10") is None
    assert value(dataclasses.replace(found, model=models(model(DENSE, 60.0))), "P10") == pytest.approx(0.2 / 60)
    eager = model(DENSE, 60.0, compile_seconds=None, note="not compiled: used up")
    (bar,) = (bar for bar in all_bars(dataclasses.replace(found, model=models(eager))) if bar.number == "P10")
    assert (bar.value, bar.lacking) == (None, f"{DENSE}: not compiled: used up")


def test_the_worst_mover_of_all_that_move_enough() -> None:
    large = [
        kernel(op, OURS, 1.0, necessary_bytes=10**9, share_of_copy=share, variant=f"scale {share}")
        for op, share in (
            ("merge_patches", 0.9), ("merge_tokens", 0.8), ("scatter_back", 0.95), ("scatter_back", 0.7), ("scatter_into", 0.75)
        )
    ]  # fmt: skip
    small = kernel("merge_tokens", OURS, 1.0, necessary_bytes=10**6, share_of_copy=0.1)
    rival = kernel("merge_tokens", EAGER, 1.0, necessary_bytes=10**9, share_of_copy=0.1)
    both = kernel("merge_tokens", OURS, 1.0, necessary_bytes=10**9, share_of_copy=0.1, direction=BACKWARD)
    assert value(kernels(*large, small, rival, both), "P13") == 0.7
    for missing in range(len(large)):
        assert value(kernels(*large[:missing], *large[missing + 1 :], small, rival), "P13") is None
        lost = dataclasses.replace(large[missing], gate=FAILED, median_ms=None, share_of_copy=None)
        assert value(kernels(*large[:missing], lost, *large[missing + 1 :]), "P13") is None


def linears(times: dict[str, float], op: str, rows: int) -> list[KernelRow]:
    """Rows of every linear layer, all alike but at one number of rows of one op."""
    usual = {OURS: 1.0, EAGER: 1.2, COMPILED: 1.1, TIGHT: 1.0}
    made = []
    for number, operation in enumerate(ops_linear.OPERATIONS):
        special = operation.name == op and number % 3 == rows
        own = {**usual, **(times if special else {})}
        made += [kernel(operation.name, name, time, variant=f"number {number}") for name, time in own.items()]
    return made


def test_linear_bars_are_those_of_the_worst_layer_and_number_of_rows() -> None:
    bias, fused = ops_linear.BIAS, ops_linear.RESIDUAL
    usual = linears({}, bias, 0)
    assert value(kernels(*usual), "P9", "same M") == pytest.approx(1.2)
    assert value(kernels(*usual), "P9", "element-wise") == pytest.approx(1.2)
    assert value(kernels(*usual), "P9", "compiled") == pytest.approx(1.1)
    assert value(kernels(*usual), "P9", "capacity") == 1.0
    slow = kernels(*linears({OURS: 1.25}, bias, 1))
    assert value(slow, "P9", "same M") == pytest.approx(1.2 / 1.25)
    assert value(slow, "P9", "element-wise") == pytest.approx(1.2)
    assert value(slow, "P9", "capacity") == pytest.approx(1.25)
    assert value(kernels(*linears({COMPILED: 0.9}, fused, 2)), "P9", "compiled") == pytest.approx(0.9)
    assert value(kernels(*linears({EAGER: 1.05}, fused, 2)), "P9", "element-wise") == pytest.approx(1.05)
    assert value(kernels(*linears({TIGHT: 0.8}, ops_linear.GELU, 0)), "P9", "capacity") == pytest.approx(1.25)


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("missing", [OURS, EAGER, COMPILED, TIGHT])
def test_a_linear_bar_needs_every_number_of_rows(missing: str, number: int) -> None:
    """Of the first layer and of the second one."""
    rows = linears({}, ops_linear.BIAS, 0)
    without = {
        OURS: ({"same M", "capacity"}, {"element-wise", "compiled", "capacity"}),
        EAGER: ({"same M"}, {"element-wise"}),
        COMPILED: (set(), {"compiled"}),
        TIGHT: ({"capacity"}, {"capacity"}),
    }[missing][number // 3]
    lost = [row for row in rows if (row.variant, row.contender) == (f"number {number}", missing)]
    left = [row for row in rows if row not in lost]
    assert len(left) == len(rows) - 1
    failed = [dataclasses.replace(row, gate=FAILED, median_ms=None) for row in lost]
    for rest, lacking in ((left, None), ([*left, *failed], f"{missing}: FAILED")):
        found = [bar for bar in all_bars(kernels(*rest)) if bar.number == "P9"]
        assert len(found) == 4
        for bar in found:
            is_without = any(what in bar.what for what in without)
            assert (bar.value is None, bar.lacking) == (is_without, lacking if is_without else None)


def test_a_kernel_bar_says_what_it_lacks() -> None:
    both = {"gate": NOT_RUN, "problem": "not compiled: --compile-minutes 0.4 is used up"}
    varlen = {"gate": NOT_RUN, "problem": "torch has none", "direction": BACKWARD}
    found = kernels(
        kernel("upsample_argmax", OURS, 1.0, extra_memory_bytes=10),
        kernel("upsample_argmax", COMPILED, None, **both),
        kernel("ragged_attention_wide", plain_attention.VARLEN, None, **varlen),
        kernel("exit_head", OURS, None, gate=FAILED),
    )
    lacking = {(bar.number, bar.what): bar.lacking for bar in all_bars(found) if bar.lacking is not None}
    assert {number: reason for (number, _), reason in lacking.items()} == {
        "P8": "varlen_attn: torch has none",
        "P10": "step_kernels: FAILED",
        "P12": "PyTorch compiled: not compiled: --compile-minutes 0.4 is used up",
    }
    assert len(lacking) == 3


@pytest.mark.parametrize(
    "spoilt",
    [
        kernels(kernel("upsample_argmax", OURS, 1.0), kernel("upsample_argmax", COMPILED, 4.0), size=512),
        kernels(kernel("upsample_argmax", OURS, 1.0, device="cpu"), kernel("upsample_argmax", COMPILED, 4.0)),
        kernels(kernel("upsample_argmax", OURS, None, gate=FAILED), kernel("upsample_argmax", COMPILED, 4.0)),
        kernels(kernel("upsample_argmax", OURS, 1.0)),
    ],
    ids=["another size", "a CPU", "failed", "no rival"],
)
def test_other_rows_decide_no_bar(spoilt: Evidence) -> None:
    assert value(spoilt, "P12", "compiled") is None


def test_the_seven_figures_of_the_abstract() -> None:
    published = [(figure.what, figure.published) for figure in paper.FIGURES]
    assert len(published) == 7
    assert [number for _, number in published] == ["2.5x", "2.6x", "3.4x", "4x", "1.7x", "2.0 %", "40 %"]
    nothing = Evidence("cpu", main=MAIN)
    assert {paper.ours(figure, nothing) for figure in paper.FIGURES} == {paper.NOT_MEASURED}
    rows = models(model(DENSE, 60.0), model(MERGED_STATIC, 20.0), model(EXITS_STATIC, 16.0, flop_reduction=3.9))
    found = [paper.ours(figure, Evidence("gpu", model=rows)) for figure in paper.FIGURES]
    assert found == ["2.50x (a setting)", "3.20x", "3.00x", "3.90x", "3.75x", "not measured", "40% (a setting)"]
    table = text.figures_table(nothing)
    assert f"| STEP: inference speed | 1.7x | not measured | {MAIN.rows[2].speedup:.2f}x |" in table
    assert table.count("not measured") == 8  # seven on a GPU; accuracy on a CPU, too


@pytest.mark.parametrize(
    "dense",
    [
        model(DENSE, 60.0, compile_seconds=None, note="not compiled: --compile-minutes 1 is used up"),
        model(DENSE, 60.0, note="tail not compiled"),
        dataclasses.replace(model(DENSE, 60.0), gate=FAILED, **dict.fromkeys(TIMING_FIELDS_OF_MODELS)),
    ],
    ids=["not compiled", "in part", "failed"],
)
def test_no_figure_of_speed_where_the_bars_refuse_the_baseline(dense: ModelRow) -> None:
    found = Evidence("gpu", model=models(dense, model(MERGED_STATIC, 20.0), model(EXITS_STATIC, 16.0)))
    assert value(found, "P1", "B=8") is value(found, "P2", "B=8") is None
    speeds = {figure.what: paper.ours(figure, found) for figure in paper.FIGURES if figure.kind == paper.SPEED}
    assert speeds == {"dCTS: throughput": paper.NOT_MEASURED, "STEP: inference speed": paper.NOT_MEASURED}
    tokens, compute, *_ = (paper.ours(figure, found) for figure in paper.FIGURES)
    assert (tokens, compute) == ("2.50x (a setting)", "3.20x")


def test_bars_table_says_by_how_much() -> None:
    table = text.bars_table([Bar("P1", "a", 2.0, 2.3, 1.5), Bar("P1", "b", 2.0, 2.3, None), Bar("P2", "c", 1, 1, None)])
    assert "| P1 | a | 1.5 | 2 | 2.3 | missed by 25.0% |" in table
    assert "| P2, 1 of 2 parts of P1 | | not measured |" in table
    assert "at most 0.01" in text.bars_table([Bar("P10", "", 0.01, 0.003, 0.02, True)])


def test_bars_table_says_what_is_lacking() -> None:
    lost = Bar("P9", "a", 0.93, 0.98, None, lacking="rival: not timed: one\ntwo | three")
    table = text.bars_table(
        [Bar("P8", "b", 1.1, 1.4, None), lost, Bar("P9", "c", 1, 1, None), Bar("P10", "d", 1, 1, None)]
    )
    assert "| P9 | a | - | 0.93 | 0.98 | not measured: rival: not timed: one two / three |" in table
    assert "| P8, P10, 1 of 2 parts of P9 | | not measured |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| P9 |" in text.bars_table([lost]) and len(text.bars_table([lost]).splitlines()) == 3


@pytest.mark.parametrize(
    "lost", ["<!-- end of table -->\n", "<!-- table: one/bench.json -->\n", "<!-- end of report -->\n"]
)
def test_a_region_that_lost_a_mark_swallows_nothing(lost: str, tmp_path: Path) -> None:
    write(tmp_path / "one", MAIN)
    page = (
        "<!-- table: one/bench.json -->\n<!-- end of table -->\nby hand\n"
        "<!-- report: one -->\n<!-- end of report -->\n<!-- table: one/bench.json -->\n<!-- end of table -->\n"
    )
    assert "by hand" in readme.regenerated(page, tmp_path)
    with pytest.raises(ValueError, match="a start and an end of every region"):
        readme.regenerated(page.replace(lost, "", 1), tmp_path)


def test_bars_table_shows_the_spread_where_there_is_one() -> None:
    plain, spread = Bar("P1", "a", 2.0, 2.3, 1.5), Bar("P2", "b", 2.0, 2.3, 2.5, spread=(2.25, 2.75))
    assert "| measured |" in text.bars_table([plain]) and "In brackets" not in text.bars_table([plain])
    table = text.bars_table([plain, spread])
    assert "| measured (by p20 and p80) |" in table
    assert "| 1.5 |" in table and "| 2.5 (2.25 - 2.75) |" in table
    assert table.splitlines()[-2:] == ["", text.SPREAD]


def test_a_busy_machine_is_called_busy() -> None:
    assert "busy" not in text.heading(Evidence("cpu", main=dataclasses.replace(MAIN, notes=("a note",))))
    busy = dataclasses.replace(MAIN, notes=("This machine was busy with other work (load 9 before the start): ...",))
    assert text.heading(Evidence("cpu", main=busy)).endswith("; busy with other work while it measured:")


def write(folder: Path, main: Result | None = None, kernels: KernelResult | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, result in (("bench.json", main), ("kernels.json", kernels)):
        if result is not None:
            result.write(folder / name)
    return folder


@pytest.mark.parametrize("key", MACHINE)
def test_machines_are_never_mixed(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = KernelResult((kernel("merge_tokens", OURS, 1.0),), {**MAIN.environment, key: "another"}, KERNEL_SETTINGS)
    folder = write(tmp_path / "mixed", MAIN, other)
    assert main(["report", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "different machines" in captured.err and key in captured.err
    same = dataclasses.replace(other, environment={**MAIN.environment, "date": "later", "load_average": 9.0})
    assert len(read(write(folder, kernels=same)).results()) == 2


def test_two_folders_are_two_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write(tmp_path / name, MAIN) for name in ("one", "two"))
    assert main(["report", str(one), str(two), "--no-plots"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("# one\n") == printed.count("# two\n") == 1
    assert printed.count("| P15 |") == 4 and printed.count("## bench.json") == 2
    assert not list(tmp_path.rglob("*.png"))


def test_the_default_is_what_is_committed(tmp_path: Path) -> None:
    write(tmp_path / "machine", MAIN)
    (tmp_path / "empty").mkdir()
    assert committed(tmp_path) == [tmp_path / "machine"]
    assert committed(tmp_path / "nowhere") == []
    assert COMMITTED in committed(COMMITTED.parent)


@pytest.mark.parametrize("content", [None, "{", '{"kind": "model"}'])
def test_other_folders_are_refused(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "model.json").write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_plots_hold_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra bench")
    (tmp_path / "attention.png").write_bytes(b"of an earlier result")
    without_profile = dataclasses.replace(MAIN, profile={})
    drawn = plots.write(Evidence("cpu", main=without_profile), tmp_path)
    assert [path.name for path in drawn] == ["speedup.png", "bars.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.png", "speedup.png"]
    assert len(speedup.runs(Evidence("cpu", main=MAIN))) == 2
    assert all(draw(Evidence("empty")) is None for draw in plots.PLOTS.values())
    assert plots.attention(Evidence("cpu", kernels=KernelResult((), GPU, {}))) is None


def test_plots_of_a_gpu() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra bench")
    rows = [
        kernel("ragged_attention_equal", OURS, 1.0, variant=f"q, {length} an image", teraflops_per_second=300.0)
        for length in paper.ANCHOR_LENGTHS
    ]
    found = dataclasses.replace(kernels(*rows), model=models(model(DENSE, 60.0), model(MERGED_STATIC, 20.0)))
    (axis,) = plots.attention(found).axes
    labels = [line.get_label() for line in axis.lines]
    assert labels[0] == OURS
    assert sorted(labels[1:]) == sorted(f"{name} (published, H100)" for name in paper.ANCHORS)
    assert list(axis.lines[0].get_ydata()) == [300.0] * 3
    (run,) = speedup.runs(found)
    assert (run.contender, run.where, run.speedup) == (MERGED_STATIC, "ViT-L, 1024 px, batch 8", 3.0)
    (axis,) = plots.time(found).axes
    assert sorted(patch.get_width() for patch in axis.patches) == pytest.approx([1 / 3, 2 / 3])
    (axis,) = plots.bars(found).axes
    assert {label.get_text().split(":")[0] for label in axis.get_yticklabels()} == {"P1"}


def test_missing_matplotlib_costs_the_plots_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(write(tmp_path / "one", MAIN))]) == 0
    captured = capsys.readouterr()
    assert "| P15 |" in captured.out and "no plots: matplotlib is not installed" in captured.err


def test_regions_are_rewritten_and_the_rest_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "one", MAIN)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: one/bench.json -->\nold\n<!-- end of table -->\nbetween\n"
        "<!-- report: one -->\nold\n<!-- end of report -->\nafter\n",
        encoding="utf-8",
    )
    assert main(["report", str(folder), "--no-plots", "--readme", str(page)]) == 0
    made = page.read_text(encoding="utf-8")
    assert "old" not in made and made.startswith("before\n") and made.endswith("after\n") and "\nbetween\n" in made
    assert "| merged + exits | PASSED |" in made and "| P15 |" in made
    assert readme.regenerated(made, tmp_path) == made
    shutil.rmtree(folder)
    assert main(["report", str(write(tmp_path / "two", MAIN)), "--no-plots", "--readme", str(page)]) == 2
    assert "page.md" in capsys.readouterr().err


def test_a_failed_row_is_no_evidence() -> None:
    nothing = dict.fromkeys((*TIMING_FIELDS, *COST_FIELDS))
    rows = tuple(
        dataclasses.replace(row, gate=FAILED, **nothing) if row.provider == "merged" else row for row in MAIN.rows
    )
    found = Evidence("cpu", main=dataclasses.replace(MAIN, rows=rows))
    assert value(found, "P15", "given, merged:") is None
    assert [run.contender for run in speedup.runs(found)] == ["merged + exits"]
    assert paper.main_row(found, "merged") is None
    assert json.loads(found.main.to_json())["rows"][1]["speedup"] is None
