"""Whole models at a small size: who runs on a CPU is right, who cannot run says why, and a wrong model has no time."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_cases import NANO, no_time
from torch import Tensor

from bench import model
from bench.engine import Case, Contender, compete
from bench.layouts import KINDS, SPREAD, draw_traces
from bench.model.parts import ROWS_WASTE, TILE, PartsViT, bucket_of, by_padding, vendor_linear
from bench.options import Options
from bench.result import FAILED, NOT_RUN, PASSED, Row
from bench.segmenters import (
    DENSE,
    EXITS,
    MERGED,
    MERGED_EXITS,
    Segmenters,
    Weights,
    draw_inputs,
    draw_weights,
    plain_upsample_argmax,
    threshold_for,
)
from step_kernels.model.vit import PRESETS

OPTIONS = Options(torch.device("cpu"), torch.float32, ("tiny",), (64,), (2,))
FAMILIES = (DENSE, MERGED, EXITS, MERGED_EXITS)


@functools.cache
def segmenters(dtype: torch.dtype = torch.float32) -> Segmenters:
    options = dataclasses.replace(OPTIONS, dtype=dtype)
    traces = draw_traces(SPREAD, 3, 2, (4, 4), block=8)
    return Segmenters(draw_weights(options, "tiny", 64), draw_inputs(options, 2, 64), traces)


def rows_of(case: Case) -> dict[str, Row]:
    return {row.contender: row for row in compete(case, no_time, rounds=2)}


def judged(contender: Contender) -> Row:
    case = Case("one", {}, 3, segmenters().expected(DENSE), {"one": lambda: contender})
    return rows_of(case)["one"]


def test_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of layouts at the first size and batch; the baseline is built once for all of them."""
    monkeypatch.setitem(PRESETS, "nano", NANO)
    seen, dense = [], dict[int, set[int]]()
    for case in model.cases(dataclasses.replace(OPTIONS, vit=("nano",), batch=(2, 1))):
        seen.append((case.name, case.shape["batch"], case.shape["layout"]))
        dense.setdefault(case.shape["batch"], set()).add(id(case.contenders[DENSE]()))
        if case.shape["batch"] == 1:
            continue
        for name, row in rows_of(case).items():
            if row.problem is not None:
                assert row.gate == NOT_RUN and row.problem.startswith("needs a CUDA device"), row
            else:
                assert row.gate == PASSED and row.median_ms, row
            assert (row.problem is not None) == any(
                word in name for word in ("graph", "static", "our k", "grouped")
            ) or (name == "merged + exits, static, no graph")
    assert seen == [*(("segmenter", 2, kind) for kind in KINDS), ("segmenter", 1, SPREAD)]
    assert [len(ids) for ids in dense.values()] == [1, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_families_pass(family: str, dtype: torch.dtype) -> None:
    own = segmenters(dtype)
    assert judged(own.contender(family, own.eager(family), ours=True)).gate == PASSED


def perturbed(weights: Weights) -> None:
    weights.vit.blocks[3].attn.proj.weight.data[0] += 0.05


def without_a_bias(weights: Weights) -> None:
    weights.vit.blocks[5].mlp.fc1.bias.data.zero_()


def without_a_norm(weights: Weights) -> None:
    weights.vit.norm.weight.data.fill_(1.0)


def without_a_block(weights: Weights) -> None:
    last: Any = weights.vit.blocks[10]
    last.attn.proj.weight.data.zero_(), last.attn.proj.bias.data.zero_()
    last.mlp.fc2.weight.data.zero_(), last.mlp.fc2.bias.data.zero_()


def another_exit(weights: Weights) -> None:
    weights.exits[8].head.bias.data.zero_()


@pytest.mark.parametrize("change", [perturbed, without_a_bias, without_a_norm, without_a_block, another_exit])
def test_wrong_models_fail(change: Callable[[Weights], None]) -> None:
    own = segmenters()
    wrong = dataclasses.replace(own, weights=copy.deepcopy(own.weights))
    change(wrong.weights)
    assert judged(own.contender(MERGED_EXITS, wrong.eager(MERGED_EXITS), ours=False)).gate == FAILED


@pytest.mark.parametrize(("claimed", "computed"), [(MERGED, DENSE), (MERGED_EXITS, MERGED), (EXITS, MERGED_EXITS)])
def test_another_family_fails(claimed: str, computed: str) -> None:
    own = segmenters()
    assert judged(own.contender(claimed, own.eager(computed), ours=False)).gate == FAILED


@pytest.mark.parametrize(
    "spoil",
    [lambda labels: labels + 150, lambda labels: labels[:, :-1], lambda labels: labels.roll(1, 1), torch.zeros_like],
    ids=["no classes", "cut off", "shifted", "one class"],
)
def test_wrong_labels_fail(spoil: Callable[[Tensor], Tensor]) -> None:
    own = segmenters()
    labels = own.eager(DENSE)
    assert judged(own.contender(DENSE, lambda number: spoil(labels(number).int()), ours=False)).gate == FAILED


def test_recorded_model_repeats_decisions_and_asks_the_policy() -> None:
    """Trimmed decisions and untrimmed ones, as graphs of exact sizes and of static mode hold them."""
    own, asked = segmenters(), []
    hook = own.weights.policy.register_forward_hook(lambda *_: asked.append(1))
    expected = own.model(MERGED_EXITS).predict(own.inputs[1], replay=own.traces[1])
    for trace, static in ((own.traces[1], False), (own.traces[1].untrim(), True)):
        with torch.no_grad():
            labels = own.repeating(MERGED_EXITS, trace).predict(own.inputs[1], static=static)
        assert torch.equal(labels, expected)
    hook.remove()
    assert len(asked) == 2


def test_parts_compute_the_same_in_static_mode() -> None:
    """With another linear function, which sees the layout: what grouped_mm needs."""
    own, capacities = segmenters(), set()

    def linear(layer: Any, x: Tensor, layout: Any) -> Tensor:
        capacities.add(layout.capacity)
        return vendor_linear(layer, x, layout)

    vit = PartsViT(own.weights.vit, by_padding, linear)
    labels = own.eager(MERGED_EXITS, vit)
    assert judged(own.contender(MERGED_EXITS, labels, ours=False)).gate == PASSED
    assert capacities == {count for trace in own.traces for count in trace.token_counts()}


def test_buckets_waste_little() -> None:
    for count in range(1, 5000, 7):
        bucket = bucket_of(count, ROWS_WASTE)
        assert bucket >= count and bucket % TILE == 0 and bucket - count < max(TILE, count * ROWS_WASTE + 1)
    assert len({bucket_of(count, ROWS_WASTE) for count in range(1 << 14, 1 << 15)}) <= 17


def test_threshold_is_exceeded_by_the_share() -> None:
    confidence = torch.tensor([0.0, 0.9, 0.1, 0.5, 0.3, 0.7])
    assert (confidence > threshold_for(confidence, 0.4)).tolist() == [False, True, False, False, False, True]
    assert threshold_for(confidence, 0.0) > 0.9 and 0.0 < threshold_for(confidence, 1.0) < 0.1


def test_large_maps_are_upsampled_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(3, 5, 4, 4)
    whole = plain_upsample_argmax(scores, (8, 8))
    monkeypatch.setattr("bench.segmenters.LARGEST_INDEX", 5 * 64 + 1)
    assert torch.equal(plain_upsample_argmax(scores, (8, 8)), whole)
