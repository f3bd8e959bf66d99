"""The gate lets honest contenders pass; its truths, its yardstick, and what it compares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from dishonest_contenders import with_scores
from torch import Tensor

from bench import gate
from bench.case import Case, build_case
from bench.images import VIEWS, Photographs
from bench.job import measure
from bench.oracle import segment
from bench.providers import Contender, build_contenders
from bench.schema import Result
from bench.settings import Settings
from step_kernels import SupertokenLayout
from step_kernels.model import Stage, StepSegmenter, Trace


@pytest.mark.parametrize(("batch", "found"), [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (8, 8), (9, 8), (32, 8)])
def test_compared_images_are_of_every_place_or_spread_over_the_batch(batch: int, found: int) -> None:
    for places in (gate.spread_images(VIEWS, batch), gate.draw_images(VIEWS, batch)):
        assert len(places) == VIEWS and len(set(places)) == found
        assert set(places) <= set(range(batch))
        assert {0, batch - 1} <= set(places)
    assert gate.spread_images(1, batch) == gate.draw_images(1, batch) == (0,)


def test_other_batch_sizes_pass(drawn_photographs: Photographs) -> None:
    for batch in (1, 3):
        pixels = drawn_photographs.pixels[[0, 1, 0][:batch]].copy()
        pixels[-1] = pixels[-1].T.swapaxes(0, 2)[::-1]
        settings = Settings(model="tiny", size=64, batch=batch, tokens=1.6)
        with patch("bench.case.VIEWS", 2):
            case = build_case(settings, Photographs(("one", "two", "three")[:batch], pixels, ()))
        for contender in build_contenders(case):
            assert gate.check(contender, case.inputs).passed, (batch, contender.name)


def test_every_contender_passes(rotating: Case, rivals: dict[str, Contender]) -> None:
    assert list(rivals) == ["dense", "merged", "merged + exits"]
    for contender in rivals.values():
        verdict = gate.check(contender, rotating.inputs)
        assert verdict.passed, (contender.name, verdict)
        assert 0 < verdict.max_error <= verdict.allowed_error < 1e-4
        assert verdict.labels_differ == 0
        assert verdict.decisions_differ == (None if contender.name == "dense" else 0.0)


def test_free_runs_are_of_the_first_and_the_last_input(rotating: Case, rivals: dict[str, Contender]) -> None:
    asked = []

    def decide(images: Tensor) -> Trace:
        asked.append(next(number for number, own in enumerate(rotating.inputs) if own is images))
        return rivals["merged"].traces[0]

    assert gate.check(dataclasses.replace(rivals["merged"], decide=decide), rotating.inputs).decisions_differ > 0
    assert asked == [0, 7]


@pytest.mark.parametrize("policy", ["given", "quota", "none"])
def test_other_policies_pass_too(small_case: Callable[..., Case], policy: str) -> None:
    case = small_case(policy=policy, exits=(4, 8))
    built = build_contenders(case)
    assert [contender.name for contender in built][1:] == (
        ["exits"] if policy == "none" else ["merged", "merged + exits"]
    )
    for contender in built:
        assert gate.check(contender, case.inputs).passed, contender.name


def test_bfloat16_is_held_to_the_error_of_plain_bfloat16(small_case: Callable[..., Case]) -> None:
    case = small_case(dtype="bfloat16")
    for contender in build_contenders(case):
        verdict = gate.check(contender, case.inputs)
        assert verdict.passed, (contender.name, verdict)
        assert 1e-4 < verdict.allowed_error < 0.2


def broken_case(small_case: Callable[..., Case], fault: str) -> Case:
    """A case in which the oracle itself cannot be followed: its weights are spoilt after the decisions were calibrated."""
    case = small_case(dtype="float16" if fault == "overflow" else "float32")
    with torch.no_grad():
        if fault == "overflow":  # finite in fp64, infinite in float16
            case.decoder.head.weight.mul_(6e4).clamp_(-6e4, 6e4)
            case.vit.norm.weight.mul_(1000)
        else:
            case.decoder.head.weight[3, 5] = math.nan
    return case


@pytest.mark.parametrize("fault", ["overflow", "NaN weight"])
def test_nothing_passes_where_the_oracle_is_not_finite(small_case: Callable[..., Case], fault: str) -> None:
    case = broken_case(small_case, fault)
    built = build_contenders(case)
    assert len(built) == 3
    for contender in built:
        verdict = gate.check(contender, case.inputs)
        assert not verdict.passed, contender.name
        assert verdict.allowed_error == math.inf
    lines: list[str] = []
    rows = measure(case, built, print_line=lines.append)
    assert {(row.gate, row.allowed_error, row.median_ms) for row in rows} == {("FAILED", None, None)}
    assert all("FAILED" in line and "oracle's own scores are not finite" in line for line in lines)
    assert Result.from_json(Result(tuple(rows), {}, {}).to_json()).rows == tuple(rows)


def test_truth_that_is_not_finite_on_a_later_input_fails(case: Case, contenders: dict[str, Contender]) -> None:
    def oracle(model: StepSegmenter, images: Tensor, trace: Trace) -> Tensor:
        scores = segment(model, images, trace)
        return scores * math.nan if any(torch.equal(images, own[None].double()) for own in case.inputs[-1]) else scores

    assert gate.check(contenders["merged"], case.inputs, oracle=segment).passed
    assert not gate.check(contenders["merged"], case.inputs, oracle=oracle).passed


def test_zero_head_is_exact_and_passes(small_case: Callable[..., Case]) -> None:
    case = small_case(exits=())
    with torch.no_grad():
        case.decoder.head.weight.zero_()
        case.decoder.head.bias.zero_()
    for contender in build_contenders(case):
        verdict = gate.check(contender, case.inputs)
        assert (verdict.passed, verdict.max_error, verdict.allowed_error) == (True, 0.0, 0.0), contender.name
        wrong = with_scores(contender, lambda scores: scores + 1e-30)
        assert not gate.check(wrong, case.inputs).passed


def test_truth_is_computed_on_every_input_and_its_plain_error_on_one_image_of_each_place(
    rotating: Case, rivals: dict[str, Contender]
) -> None:
    asked = []

    def oracle(model: StepSegmenter, images: Tensor, trace: Trace) -> Tensor:
        single = images.float()
        asked.append((images.dtype, [bool((own == single).flatten(1).all(1).any()) for own in whole]))
        assert images.shape[0] == trace.layout.batch_size == 1
        return segment(model, images, trace)

    whole = torch.stack(rotating.inputs).unbind(1)  # by place in the batch
    gate.check(rivals["merged"], rotating.inputs, compared=gate.spread_images(VIEWS, 2), oracle=oracle)
    exact, plain = torch.float64, torch.float32
    first, second = [True, False], [False, True]
    start = [(exact, first), (plain, first), (exact, second), (plain, second)]
    assert asked == [*start, *[(exact, first), (exact, second)] * 3]


@pytest.mark.parametrize("place", [0, 1])
def test_yardstick_is_the_largest_plain_error(case: Case, contenders: dict[str, Contender], place: int) -> None:
    image = case.inputs[place][place : place + 1]

    def oracle(model: StepSegmenter, images: Tensor, trace: Trace) -> Tensor:
        scores = segment(model, images, trace)
        plain = images.dtype == torch.float32 and torch.equal(images, image)
        return scores + 0.25 if plain else scores

    verdict = gate.check(contenders["dense"], case.inputs, compared=(0, 1), oracle=oracle)
    assert verdict.allowed_error == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("error", "allowed", "expected"),
    [(3.0, 1.0, 2.0), (0.0, 0.0, 0.0), (math.inf, 1.0, math.inf), (0.0, math.inf, math.inf), (math.inf,) * 3],
)
def test_excess_is_infinite_where_nothing_can_be_compared(error: float, allowed: float, expected: float) -> None:
    assert gate.excess(error, allowed) == expected


def test_tie_is_no_wrong_label_and_a_gap_is() -> None:
    truth = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    truth[:, 0], truth[:, 1] = 1.0, 1.0 - 1.5e-3
    assert gate.wrong_labels(torch.zeros(1, 4, 4, dtype=torch.int32), truth, allowed=1e-3) == 0
    assert gate.wrong_labels(torch.ones(1, 4, 4, dtype=torch.int32), truth, allowed=1e-3) == 0
    assert gate.wrong_labels(torch.ones(1, 4, 4, dtype=torch.int32), truth, allowed=0.5e-3) == 16
    assert gate.wrong_labels(torch.full((1, 4, 4), 2, dtype=torch.uint8), truth, allowed=1e-3) == 16
    assert gate.wrong_labels(torch.zeros(1, 4, 4, dtype=torch.int32), truth * math.nan, allowed=1e-3) == 16


def test_share_of_other_decisions_counts_patches() -> None:
    layout = SupertokenLayout.uniform(1, (4, 4), num_prefix=1)
    sides = torch.ones(1, 4, 4, dtype=torch.int32)
    sides[0, :2, :2] = 2
    other = SupertokenLayout.from_sides(sides, num_prefix=1).trim()
    assert gate.share_decided_differently(Trace(layout), Trace(layout)) == 0.0
    assert gate.share_decided_differently(Trace(other), Trace(layout)) == 4 / 16
    left = torch.ones(1, 4, 4, dtype=torch.int32)
    left[0, 0] = 0
    survivors = SupertokenLayout.from_sides(left, num_prefix=1).trim()
    halted = torch.zeros(17, dtype=torch.bool)
    nobody, row = Stage(8, halted, layout), Stage(8, halted, survivors)
    assert gate.share_decided_differently(Trace(layout, (row,)), Trace(layout, (nobody,))) == 4 / 16


def test_unit_in_last_place_is_the_spacing_at_the_largest_value() -> None:
    assert gate.unit_in_last_place(torch.tensor([-3.0, 1.0]), torch.float32) == 2 * 2.0**-23
    assert gate.unit_in_last_place(torch.tensor([0.0]), torch.float32) == 0.0
    for value in (math.nan, math.inf):
        assert gate.unit_in_last_place(torch.tensor([1.0, value]), torch.float32) == math.inf
