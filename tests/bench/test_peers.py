"""The peers pass the gate that ours pass, do the work that they claim, and with one thing wrong fail."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import tome_standin
import torch
import torch.nn.functional as F
from bench_cases import NANO, no_time
from real_timm import timm
from torch import Tensor

from bench import peers
from bench.engine import Case, NotRun, compete
from bench.layouts import ALL_HALTED, EMPTY_IMAGE, FIXED, NONE_HALTED, QUOTA, SPREAD, draw_traces
from bench.options import Options
from bench.peers import eager, tome
from bench.peers.eager import decisions_of
from bench.result import FAILED, PASSED, SPEEDUP, Row
from bench.segmenters import DENSE, MERGED, Segmenters, draw_inputs, draw_weights
from step_kernels.model.vit import PRESETS

ANY_LAYOUT = ["dense", "DToP", "dCTS + DToP"]
WITH_CTS = ["CTS", "CTS + DToP"]


@pytest.fixture(autouse=True)
def nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", NANO)


def options(**changes: Any) -> Options:
    values = {"device": torch.device("cpu"), "dtype": torch.float32, "vit": ("nano",), "size": (64,), "batch": (3,)}
    return Options(**{**values, **changes})


def segmenters(kind: str = QUOTA, **changes: Any) -> Segmenters:
    asked = options(**changes)
    weights, inputs = draw_weights(asked, "nano", asked.size[0]), draw_inputs(asked, asked.batch[0], asked.size[0])
    (block,) = weights.exits
    grid = (asked.size[0] // 16, asked.size[0] // 16)
    return Segmenters(weights, inputs, draw_traces(kind, len(inputs), asked.batch[0], grid, block=block))


def rows_of(case: Case, names: list[str] | None = None) -> dict[str, Row]:
    contenders = {name: build for name, build in case.contenders.items() if names is None or name in names}
    found = compete(dataclasses.replace(case, contenders=contenders), no_time, seconds=0)
    return {row.contender: row for row in found}


def judged(own: Segmenters, *methods: str, attend: eager.Attend = F.scaled_dot_product_attention) -> dict[str, Row]:
    builders = {name: (lambda name=name: peers.method(own, name, attend)) for name in methods}
    return rows_of(Case("peers", {}, len(own.inputs), own.expected(DENSE), builders))


@pytest.fixture
def cases() -> dict[str, Case]:
    return {case.shape["layout"]: case for case in peers.cases(options())}


def test_everybody_passes_where_cts_can_take_part(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tome", None)
    rows = rows_of(cases[QUOTA])
    without = {name for name in rows if "static" in name or "ToMe" in name}
    assert {name: row.gate for name, row in rows.items() if row.gate != PASSED} == dict.fromkeys(without, "NOT RUN")
    assert len(rows) - len(without) == 13
    assert next(iter(rows)) == "dense, SDPA" and not rows["dense, SDPA"].ours, "the baseline"
    assert [name for name, row in rows.items() if row.ours] == [
        "merged + exits, exact",
        "merged, exact",
        "exits, exact",
    ]


def test_cts_needs_equal_counts(cases: dict[str, Case]) -> None:
    rows = rows_of(cases[SPREAD], [f"{name}, SDPA" for name in (*ANY_LAYOUT, *WITH_CTS)])
    assert {name: row.gate == PASSED for name, row in rows.items()} == {
        **{f"{name}, SDPA": True for name in ANY_LAYOUT},
        **{f"{name}, SDPA": False for name in WITH_CTS},
    }
    assert "same number of tokens in every image" in str(rows["CTS, SDPA"].problem)


@pytest.mark.parametrize("kind", [FIXED, NONE_HALTED, ALL_HALTED, EMPTY_IMAGE])
def test_adversarial_decisions(kind: str) -> None:
    assert all(row.gate == PASSED for row in judged(segmenters(kind), *ANY_LAYOUT).values())


@pytest.mark.parametrize("changes", [{"batch": (1,)}, {"size": (112,)}, {"dtype": torch.bfloat16}], ids=str)
def test_other_sizes(changes: dict[str, Any]) -> None:
    assert all(row.gate == PASSED for row in judged(segmenters(**changes), *ANY_LAYOUT, *WITH_CTS).values())


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3)).softmax(3) @ v


def test_wrong_attention_fails() -> None:
    rows = judged(segmenters(), *ANY_LAYOUT, *WITH_CTS, attend=unscaled)
    assert {row.gate for row in rows.values()} == {FAILED}


def nobody_leaves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(eager, "CERTAIN", 0.0)


def blocks_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(eager, "decisions_of", moved)


def moved(*given: Any, **more: Any) -> eager.Decisions:
    found = decisions_of(*given, **more)
    return dataclasses.replace(found, cells=found.cells.roll(1, 1))


def first_pixels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(eager, "shrink", lambda picture, side: picture[:, :, ::side, ::side])


@pytest.mark.parametrize("fault", [nobody_leaves, blocks_moved, first_pixels])
def test_one_thing_wrong_fails(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    assert judged(segmenters(), "CTS + DToP")["CTS + DToP"].gate == FAILED


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in tome_standin.package().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("changes", [{}, {"size": (112,)}, {"kind": SPREAD, "batch": (1,)}], ids=str)
def test_tome_is_judged_where_it_merges_nothing_and_timed_where_it_merges(changes: dict[str, Any]) -> None:
    own = segmenters(**changes)
    builders = {name: (lambda build=build: build(own)) for name, build in tome.CONTENDERS.items()}
    rows = rows_of(Case("peers", {}, len(own.inputs), own.expected(DENSE), builders))
    assert {row.gate for row in rows.values()} == {PASSED}
    assert rows["ToMe, r = 0"].note == f"timm {timm.__version__}, eager"
    merging = rows["ToMe, FLOPs as merged"]
    assert merging.facts[SPEEDUP] == "computes something else" and merging.note.startswith("r = ")
    assert SPEEDUP not in rows["ToMe, r = 0"].facts


@pytest.mark.usefixtures("standin")
def test_tome_merges_until_its_flops_are_no_more_than_those_of_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    own = segmenters(size=(128,), batch=(2,))
    flops = functools.partial(tome.ToMe(own).flops, own.inputs[0][:1])
    wanted = 0.7 * flops(0)
    monkeypatch.setitem(vars(own), "flops", lambda family: {MERGED: 2 * wanted}[family])
    made = tome.merging(own)
    r = int(made.note.split(";")[0].removeprefix("r = "))
    assert made.flops == 2 * flops(r) and flops(r) <= wanted < flops(r - 1)
    monkeypatch.setitem(vars(own), "flops", lambda family: 0.0)
    assert "r = 31;" in tome.merging(own).note


@pytest.mark.usefixtures("standin")
def test_tome_merges_nothing_at_the_flops_of_dense() -> None:
    own = segmenters()
    assert tome.ToMe(own).flops(own.inputs[0][:1], 0) == pytest.approx(
        own.flops(DENSE) / own.batch, rel=0.02
    )  # which counts the class token as embedded


@pytest.mark.usefixtures("standin")
def test_tome_that_merges_where_it_must_not_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    own, labels = segmenters(), tome.ToMe.labels

    def merging(self: tome.ToMe, images: Tensor) -> Any:
        self.r = 3
        return labels(self, images)

    monkeypatch.setattr(tome.ToMe, "labels", merging)
    builders = {"ToMe": lambda: tome.unmerged(own)}
    assert rows_of(Case("peers", {}, len(own.inputs), own.expected(DENSE), builders))["ToMe"].gate == FAILED


def test_tome_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    markup = types.ModuleType("tome")  # the one that PyPI calls so
    monkeypatch.setitem(sys.modules, "tome", markup)
    monkeypatch.delitem(sys.modules, "tome.patch", raising=False)
    with pytest.raises(NotRun, match=r"pip install --no-deps git\+https"):
        tome.unmerged(segmenters())
