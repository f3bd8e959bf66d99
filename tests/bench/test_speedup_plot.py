"""The plot of speed-ups: curves against resolution and batch where several were measured, bars for the rest, nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bench_model_cases import model_row

from bench.environment import REPOSITORY
from bench.evidence import plots, speedup
from bench.evidence.results import Evidence
from bench.model.layouts import FIXED
from bench.model.registry import DENSE, DENSE_OURS, EXITS_STATIC, FRONT, MERGED_STATIC
from bench.model.rows import compared
from bench.model.schema import ModelResult, ModelRow
from bench.schema import Result

MAIN = Result.read(REPOSITORY / "bench" / "results" / "cpu-2-cores" / "bench.json")
GPU = {**MAIN.environment, "gpu": "NVIDIA Test"}
TIMES = {DENSE: 60.0, EXITS_STATIC: 16.0, MERGED_STATIC: 20.0, FRONT: 1.0, DENSE_OURS: 62.0}


def comparison(size: int, batch: int, model: str = "large", layout: str = "spread") -> list[ModelRow]:
    """All contenders of one comparison; larger images and batches gain more."""
    rows = []
    for name, milliseconds in TIMES.items():
        time = milliseconds * batch * size / 1024 + (name != DENSE)
        made = model_row(name, time, batch, model=model, size=size, layout=layout)
        rows.append(dataclasses.replace(made, p20_ms=0.9 * time, p80_ms=1.2 * time))
    return [compared(row, rows[0]) for row in rows]


def evidence(*comparisons: list[ModelRow]) -> Evidence:
    rows = tuple(row for rows in comparisons for row in rows)
    return Evidence("gpu", model=ModelResult(rows, GPU, {}))


def everything() -> Evidence:
    several = [comparison(1024, batch) for batch in (8, 1, 32)] + [comparison(size, 8) for size in (512, 768)]
    return evidence(*several, comparison(1024, 8, "base"), comparison(1024, 8, layout=FIXED))


def test_a_run_is_a_contender_with_a_speed_up() -> None:
    found = speedup.runs(everything())
    assert {run.contender for run in found} == {EXITS_STATIC, MERGED_STATIC}
    assert len(found) == 2 * 6  # neither dense ones nor parts of a model, nor other layouts
    for run in found:
        assert run.p20 < run.speedup < run.p80
        assert run.realised == run.speedup / run.flop_reduction


@pytest.mark.parametrize(("device", "drawn"), [("cuda", False), ("cpu", True)])
def test_on_a_gpu_dense_must_have_been_compiled(device: str, drawn: bool) -> None:
    rows = [dataclasses.replace(row, device=device, compile_seconds=None) for row in comparison(1024, 8)]
    assert bool(speedup.runs(evidence(rows))) is drawn


def test_series_differ_in_one_thing() -> None:
    sizes, batches = speedup.series_of(speedup.runs(everything()))
    assert (sizes.along, sizes.title, sizes.values) == ("size", "ViT-L, batch 8", [512, 768, 1024])
    assert (batches.along, batches.title, batches.values) == ("batch", "ViT-L, 1024 px", [1, 8, 32])
    assert {run.batch for run in sizes.runs} == {8} and {run.size for run in batches.runs} == {1024}
    assert {run.model for run in (*sizes.runs, *batches.runs)} == {"large"}
    assert speedup.series_of(speedup.runs(evidence(comparison(1024, 8), comparison(512, 1)))) == []
    # The main job's ViT is no point of a curve of `bench model`.
    small = [comparison(1024, 4, "small")]
    both = dataclasses.replace(evidence(*small), main=MAIN)
    assert {run.model for run in speedup.runs(both)} == {"small"}
    assert speedup.series_of(speedup.runs(both)) == []


def test_curves_and_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra bench")
    figure = speedup.speedup(everything())
    by_size, by_batch, realised, _, left, right = figure.axes
    assert [label.get_text() for label in by_size.get_xticklabels()] == ["512 px", "768 px", "1024 px"]
    assert [label.get_text() for label in by_batch.get_xticklabels()] == ["1", "8", "32"]
    curves = {line.get_label(): line for line in by_size.containers}
    assert set(curves) == {EXITS_STATIC, MERGED_STATIC}
    exits = [
        run
        for run in speedup.runs(everything())
        if run.contender == EXITS_STATIC and run.batch == 8 and run.model == "large"
    ]
    assert list(curves[EXITS_STATIC].lines[0].get_ydata()) == [run.speedup for run in exits]
    drawn = [list(line.get_ydata()) for line in realised.lines]
    assert [run.realised for run in exits] in drawn
    allowed = [list(line.get_ydata()) for line in by_size.lines if line.get_linestyle() == "--"]
    assert sorted(allowed) == [[4000 / 1250] * 3, [4000 / 1000] * 3]
    assert [label.get_text() for label in left.get_yticklabels()] == [EXITS_STATIC, MERGED_STATIC]
    assert "ViT-B, 1024 px, batch 8" in {text.get_text() for text in left.texts}
    assert len(left.patches) == len(right.patches) == 2
    assert plots.write(everything(), tmp_path)[0].name == "speedup.png"


def test_an_odd_number_of_curves_leaves_no_empty_axes() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra bench")
    figure = speedup.speedup(evidence(comparison(1024, 8), comparison(512, 8)))
    assert [axis.get_visible() for axis in figure.axes] == [True, False, True, False]
    assert figure.axes[0].get_title(loc="left") == "ViT-L, batch 8: against the resolution"


def test_bars_alone_where_there_is_one_of_each() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra bench")
    left, right = speedup.speedup(Evidence("cpu", main=MAIN)).axes
    assert len(left.patches) == len(right.patches) == 2
    assert speedup.speedup(Evidence("empty")) is None
