"""The gate lets honest contenders pass and catches wrong ones; what fails it never shows a speed-up."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import environment, gate
from bench.case import Case
from bench.job import measure
from bench.oracle import segment
from bench.providers import Contender, build_contenders
from bench.report import markdown_table, plain_table
from bench.schema import TIMING_FIELDS, Result
from step_kernels import SupertokenLayout, upsample_argmax
from step_kernels.model import Stage, StepSegmenter, Trace

Scores = Callable[[Tensor, Trace], Tensor]


@pytest.fixture(scope="module")
def case(small_case: Callable[..., Case]) -> Case:
    return small_case()


@pytest.fixture(scope="module")
def contenders(case: Case) -> dict[str, Contender]:
    return {contender.name: contender for contender in build_contenders(case)}


def with_scores(contender: Contender, change: Callable[[Tensor], Tensor]) -> Contender:
    return dataclasses.replace(contender, scores=lambda images, trace: change(contender.scores(images, trace)))


def with_labels(contender: Contender, change: Callable[[Tensor], Tensor]) -> Contender:
    return dataclasses.replace(contender, labels=lambda images, trace: change(contender.labels(images, trace)))


def cached(contender: Contender) -> Contender:
    """Computes the first input and returns that answer ever after."""
    kept: list[Tensor] = []

    def scores(images: Tensor, trace: Trace) -> Tensor:
        if not kept:
            kept.append(contender.scores(images, trace))
        return kept[0]

    return dataclasses.replace(contender, scores=scores)


def skipping_blocks(contender: Contender, case: Case, kept: slice) -> Contender:
    """Runs some of the blocks."""

    def scores(images: Tensor, trace: Trace) -> Tensor:
        blocks = case.vit.blocks
        case.vit.blocks = blocks[kept]
        try:
            return contender.scores(images, trace)
        finally:
            case.vit.blocks = blocks

    return dataclasses.replace(contender, scores=scores)


def halving_the_blocks(contender: Contender, case: Case) -> Contender:
    """Does half of the work."""
    half = len(case.vit.blocks) // 2
    return with_labels_of(skipping_blocks(contender, case, slice(half)))


def repeating_one_image(contender: Contender) -> Contender:
    """Computes one image of the batch, which takes no trace of the whole batch: here from the right answer."""
    changed = with_scores(contender, lambda scores: scores[:1].expand_as(scores))
    return with_labels(changed, lambda labels: labels[:1].expand_as(labels))


def keeping_answers(contender: Contender) -> Contender:
    """Right about every input that it has seen, and never computes one twice."""
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, function: Scores) -> Scores:
        def call(images: Tensor, trace: Trace) -> Tensor:
            key = name, images.data_ptr()
            if key not in kept:
                kept[key] = function(images, trace)
            return kept[key]

        return call

    return dataclasses.replace(
        contender, scores=keep("scores", contender.scores), labels=keep("labels", contender.labels)
    )


def with_labels_of(contender: Contender) -> Contender:
    """Its labels are those of its own scores."""

    def labels(images: Tensor, trace: Trace) -> Tensor:
        return upsample_argmax(contender.scores(images, trace), (images.shape[2], images.shape[3]))

    return dataclasses.replace(contender, labels=labels)


DISHONEST: dict[str, Callable[[Contender, Case], Contender]] = {
    "wrong": lambda contender, case: with_labels_of(with_scores(contender, lambda scores: -scores)),
    "half of the blocks": halving_the_blocks,
    "one image, repeated": lambda contender, case: repeating_one_image(contender),
    "the first answer again": lambda contender, case: with_labels_of(cached(contender)),
    "answers kept by input": lambda contender, case: keeping_answers(contender),
}


@pytest.mark.parametrize("fault", DISHONEST)
def test_a_dishonest_contender_is_failed_and_gets_no_speed_up(
    case: Case, contenders: dict[str, Contender], fault: str
) -> None:
    dishonest = DISHONEST[fault](contenders["merged"], case)
    before = [images.clone() for images in case.inputs]
    lines: list[str] = []
    rows = measure(case, [contenders["dense"], dishonest], print_line=lines.append)
    assert [row.gate for row in rows] == ["PASSED", "FAILED"]
    assert all(getattr(rows[1], name) is None for name in TIMING_FIELDS)
    assert rows[0].speedup == 1.0
    assert any("gate merged: FAILED" in line for line in lines)
    assert ("turned over" in lines[-1]) == (fault == "answers kept by input")
    assert all(map(torch.equal, case.inputs, before))


def test_every_contender_passes(case: Case, contenders: dict[str, Contender]) -> None:
    assert list(contenders) == ["dense", "merged", "merged + exits"]
    for contender in contenders.values():
        verdict = gate.check(contender, case.inputs)
        assert verdict.passed, (contender.name, verdict)
        assert 0 < verdict.max_error <= verdict.allowed_error < 1e-4
        assert verdict.labels_differ == 0
    assert gate.check(contenders["dense"], case.inputs).decisions_differ is None
    assert gate.check(contenders["merged + exits"], case.inputs).decisions_differ == 0.0


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


@pytest.mark.parametrize("name", ["dense", "merged", "merged + exits"])
def test_wrong_contenders_fail(case: Case, contenders: dict[str, Contender], name: str) -> None:
    honest = contenders[name]
    wrong = {
        "one score off": with_scores(honest, lambda scores: scores + 1e-5),
        "NaN": with_scores(honest, lambda scores: scores * math.nan),
        "one cell NaN": with_scores(honest, lambda scores: scores.index_fill(2, torch.tensor([3]), math.nan)),
        "other shape": with_scores(honest, lambda scores: scores[:1]),
        "images exchanged": with_scores(honest, lambda scores: scores.flip(0)),
        "labels of another class": with_labels(honest, lambda labels: (labels + 1) % 150),
        "labels of one image only": with_labels(honest, lambda labels: labels[:1]),
        "labels out of range": with_labels(honest, lambda labels: labels.int() + 1000),
        "cached": cached(honest),
        "work skipped": skipping_blocks(honest, case, slice(-1)),
    }
    for fault, contender in wrong.items():
        assert not gate.check(contender, case.inputs).passed, fault


def test_last_input_counts_too(case: Case, contenders: dict[str, Contender]) -> None:
    honest = contenders["merged"]

    def scores(images: Tensor, trace: Trace) -> Tensor:
        error = 1.0 if images is case.inputs[-1] else 0.0
        return honest.scores(images, trace) + error

    verdict = gate.check(dataclasses.replace(honest, scores=scores), case.inputs)
    assert not verdict.passed
    assert verdict.max_error == pytest.approx(1.0, abs=1e-4)


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
        return scores * math.nan if trace is contenders["merged"].traces[-1] else scores

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


def test_truth_is_computed_on_every_input_and_its_plain_error_on_the_first(
    case: Case, contenders: dict[str, Contender]
) -> None:
    asked = []

    def oracle(model: StepSegmenter, images: Tensor, trace: Trace) -> Tensor:
        asked.append((images.dtype, trace))
        return segment(model, images, trace)

    contender = contenders["merged"]
    gate.check(contender, case.inputs, oracle=oracle)
    first, last = contender.traces
    assert asked == [(torch.float64, first), (torch.float32, first), (torch.float64, last)]


@pytest.mark.parametrize(
    ("error", "allowed", "expected"),
    [(3.0, 1.0, 2.0), (0.0, 0.0, 0.0), (math.inf, 1.0, math.inf), (0.0, math.inf, math.inf), (math.inf,) * 3],
)
def test_excess_is_infinite_where_nothing_can_be_compared(error: float, allowed: float, expected: float) -> None:
    assert gate.excess(error, allowed) == expected


def test_failed_contender_is_not_timed_and_has_no_speed_up_anywhere(
    case: Case, contenders: dict[str, Contender]
) -> None:
    def never(images: Tensor, trace: Trace) -> Tensor:
        raise AssertionError("a contender that fails its gate must not be timed")

    calls = []

    def wrong_labels(images: Tensor, trace: Trace) -> Tensor:
        calls.append(1)
        labels = contenders["merged"].labels(images, trace)
        return (labels + 1) % 150 if len(calls) <= len(case.inputs) else never(images, trace)

    wrong = dataclasses.replace(contenders["merged"], labels=wrong_labels)
    lines: list[str] = []
    rows = measure(case, [contenders["dense"], wrong, contenders["merged + exits"]], print_line=lines.append)
    assert [row.gate for row in rows] == ["PASSED", "FAILED", "PASSED"]
    assert all(getattr(rows[1], name) is None for name in TIMING_FIELDS)
    assert rows[2].speedup is not None
    assert "gate merged: FAILED" in lines[1]
    facts = environment.describe(torch.device("cpu"))
    result = Result(tuple(rows), facts, {**case.settings.as_json(), "batch": 2})
    assert json.loads(result.to_json())["rows"][1]["speedup"] is None
    for table in (plain_table(rows), markdown_table(result)):
        (line,) = [line for line in table.splitlines() if "FAILED" in line]
        assert "x" not in line.replace("exits", "")
        assert line.count("-") >= 4


def test_no_speed_up_without_a_correct_baseline(case: Case, contenders: dict[str, Contender]) -> None:
    wrong = with_scores(contenders["dense"], lambda scores: scores + 1)
    rows = measure(case, [wrong, contenders["merged"]], print_line=lambda line: None)
    assert [row.gate for row in rows] == ["FAILED", "PASSED"]
    assert rows[1].median_ms is not None
    assert rows[1].speedup is rows[1].realised is None


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
