"""The gate lets honest contenders pass and catches wrong ones; what fails it never shows a speed-up."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bench import environment, gate
from bench.case import Case, build_case
from bench.images import VIEWS, Photographs
from bench.job import measure
from bench.oracle import segment
from bench.providers import Contender, build_contenders
from bench.renewal import Renewed
from bench.report import markdown_table, plain_table
from bench.schema import TIMING_FIELDS, Result
from bench.settings import Settings
from step_kernels import SupertokenLayout, upsample_argmax
from step_kernels.model import Stage, StepSegmenter, Trace

Scores = Callable[[Tensor, Trace], Tensor]


@pytest.fixture(scope="module")
def case(small_case: Callable[..., Case]) -> Case:
    return small_case()


@pytest.fixture(scope="module")
def contenders(case: Case) -> dict[str, Contender]:
    return {contender.name: contender for contender in build_contenders(case)}


@pytest.fixture(scope="module")
def rotating(small_case: Callable[..., Case]) -> Case:
    """A case with as many inputs as the job has."""
    return small_case(inputs=VIEWS)


@pytest.fixture(scope="module")
def rivals(rotating: Case) -> dict[str, Contender]:
    return {contender.name: contender for contender in build_contenders(rotating)}


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


def wrong_on(contender: Contender, images: Tensor, position: slice = slice(None)) -> Contender:
    """Takes another class for every pixel of some images of one input."""

    def change(function: Scores, by: float) -> Scores:
        def call(given: Tensor, trace: Trace) -> Tensor:
            found = function(given, trace).clone()
            found[position if given is images else slice(0)] += by
            return found

        return call

    return dataclasses.replace(contender, scores=change(contender.scores, 1.0), labels=change(contender.labels, 1))


def with_labels_of(contender: Contender) -> Contender:
    """Its labels are those of its own scores."""

    def labels(images: Tensor, trace: Trace) -> Tensor:
        return upsample_argmax(contender.scores(images, trace), (images.shape[2], images.shape[3]))

    return dataclasses.replace(contender, labels=labels)


def keeping_answers_by_content(contender: Contender) -> Contender:
    """The same, whatever the input's address or version: who has seen all inputs takes the answer to the one that is most like it."""
    known: dict[str, list[tuple[Tensor, Tensor]]] = {"scores": [], "labels": []}

    def keep(name: str, function: Scores) -> Scores:
        def call(images: Tensor, trace: Trace) -> Tensor:
            if len(known[name]) < VIEWS:
                known[name].append((images.clone(), function(images, trace)))
                return known[name][-1][1]
            return min(known[name], key=lambda pair: float((pair[0] - images).abs().sum()))[1]

        return call

    return dataclasses.replace(
        contender, scores=keep("scores", contender.scores), labels=keep("labels", contender.labels)
    )


def honest_when_watched(contender: Contender, under_the_clock: Callable[[Tensor, Trace], Any]) -> Contender:
    """The gate asks for scores before it asks for labels, the clock for labels alone."""
    watched: list[bool] = []

    def scores(images: Tensor, trace: Trace) -> Tensor:
        watched.append(True)
        return contender.scores(images, trace)

    def labels(images: Tensor, trace: Trace) -> Tensor:
        if watched:
            watched.clear()
            return contender.labels(images, trace)
        return under_the_clock(images, trace)

    return dataclasses.replace(contender, scores=scores, labels=labels)


def computing_every_other_image(contender: Contender, case: Case) -> Contender:
    """That of its input's number, as a gate might look at it."""

    def alone(function: Scores) -> Scores:
        def call(images: Tensor, trace: Trace) -> Tensor:
            number = next(number for number, own in enumerate(case.inputs) if own is images)
            found = function(images, trace).clone()
            found[(number + 1) % len(found)] = 0
            return found

        return call

    return dataclasses.replace(contender, scores=alone(contender.scores), labels=alone(contender.labels))


class Later(Tensor):
    """Labels that are worked out when somebody looks at them."""

    function: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            now = [one.function() if isinstance(one, Later) else one for one in args]
            return function(*now, **(kwargs or {}))


def putting_it_off(contender: Contender) -> Contender:
    def labels(images: Tensor, trace: Trace) -> Tensor:
        later = torch.empty_like(images[:, 0], dtype=torch.int32).as_subclass(Later)
        later.function = functools.partial(contender.labels, images, trace)
        return later

    return dataclasses.replace(contender, labels=labels)


DISHONEST: dict[str, Callable[[Contender, Case], Contender]] = {
    "wrong": lambda contender, case: with_labels_of(with_scores(contender, lambda scores: -scores)),
    "half of the blocks": halving_the_blocks,
    "one image, repeated": lambda contender, case: repeating_one_image(contender),
    "the first answer again": lambda contender, case: with_labels_of(cached(contender)),
    "answers kept by input": lambda contender, case: keeping_answers(contender),
    "answers kept by content": lambda contender, case: keeping_answers_by_content(contender),
    "zeros when not watched": lambda contender, case: honest_when_watched(
        contender, lambda images, trace: torch.zeros_like(images[:, 0], dtype=torch.int32)
    ),
    "nothing when not watched": lambda contender, case: honest_when_watched(contender, lambda images, trace: None),
    "work put off when not watched": lambda contender, case: honest_when_watched(
        contender, putting_it_off(contender).labels
    ),
    "work put off": lambda contender, case: putting_it_off(contender),
    "wrong on one input": lambda contender, case: wrong_on(contender, case.inputs[5]),
    "wrong in one place of the batch": lambda contender, case: functools.reduce(
        lambda wrong, images: wrong_on(wrong, images, slice(1, 2)), case.inputs, contender
    ),
}


# These give right answers to everything before the clock.
FOUND_BY_THE_CLOCK = (
    "answers kept by input",
    "answers kept by content",
    "zeros when not watched",
    "nothing when not watched",
    "work put off when not watched",
)


@pytest.mark.parametrize("fault", DISHONEST)
def test_a_dishonest_contender_is_failed_and_gets_no_speed_up(
    rotating: Case, rivals: dict[str, Contender], fault: str
) -> None:
    dishonest = DISHONEST[fault](rivals["merged"], rotating)
    before = [images.clone() for images in rotating.inputs]
    lines: list[str] = []
    rows = measure(rotating, [rivals["dense"], dishonest], print_line=lines.append)
    assert [row.gate for row in rows] == ["PASSED", "FAILED"]
    assert all(getattr(rows[1], name) is None for name in TIMING_FIELDS)
    assert rows[0].speedup == 1.0
    assert any("gate merged: FAILED" in line for line in lines)
    assert lines[-1].startswith("after the clock") == (fault in FOUND_BY_THE_CLOCK)
    assert all(map(torch.equal, rotating.inputs, before))


def remembering(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same answers, worked out once for each of its tensors and their dtype: for checks that are repeated."""
    known: dict[tuple[torch.dtype, bytes], Tensor] = {}

    def call(*arguments: Any) -> Tensor:
        (images,) = [one for one in arguments if isinstance(one, Tensor)]
        key = images.dtype, images.numpy().tobytes()
        if key not in known:
            known[key] = function(*arguments)
        return known[key]

    return call


def test_wrong_on_one_input_or_in_one_place_of_the_batch_fails(rotating: Case, rivals: dict[str, Contender]) -> None:
    original, oracle = rivals["merged + exits"], remembering(segment)
    honest = dataclasses.replace(
        original, scores=remembering(original.scores), labels=remembering(original.labels), decide=None
    )
    assert gate.check(honest, rotating.inputs, oracle=oracle).passed
    for number, images in enumerate(rotating.inputs):
        wrong = wrong_on(honest, images)
        verdict = gate.check(dataclasses.replace(wrong, labels=honest.labels), rotating.inputs, oracle=oracle)
        assert (verdict.passed, verdict.labels_differ) == (False, 0), number
        assert verdict.max_error == pytest.approx(1.0, abs=1e-4)
        verdict = gate.check(dataclasses.replace(wrong, scores=honest.scores), rotating.inputs, oracle=oracle)
        assert (verdict.passed, verdict.labels_differ) == (False, 64 * 64), number
    for place in range(2):
        wrong = honest
        for images in rotating.inputs:
            wrong = wrong_on(wrong, images, slice(place, place + 1))
        verdict = gate.check(wrong, rotating.inputs, oracle=oracle)
        assert (verdict.passed, verdict.labels_differ) == (False, VIEWS // 2 * 64 * 64), place


@pytest.mark.parametrize(("batch", "found"), [(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (8, 8), (9, 8), (32, 8)])
def test_compared_images_are_of_every_place_or_spread_over_the_batch(batch: int, found: int) -> None:
    for places in (gate.spread_images(VIEWS, batch), gate.draw_images(VIEWS, batch)):
        assert len(places) == VIEWS and len(set(places)) == found
        assert set(places) <= set(range(batch))
        assert {0, batch - 1} <= set(places)
    assert gate.spread_images(1, batch) == gate.draw_images(1, batch) == (0,)


def test_nobody_knows_which_image_is_compared(rotating: Case, rivals: dict[str, Contender]) -> None:
    """Who computes one image of each input fails wherever another one is drawn."""
    assert len({gate.draw_images(VIEWS, 4) for _ in range(100)}) > 50  # of 2520
    honest, oracle = rivals["merged"], remembering(segment)
    known = dataclasses.replace(
        honest, scores=remembering(honest.scores), labels=remembering(honest.labels), decide=None
    )
    lazy = computing_every_other_image(known, rotating)
    assert gate.check(lazy, rotating.inputs, compared=gate.spread_images(VIEWS, 2), oracle=oracle).passed
    for number in range(VIEWS):
        places = [own % 2 for own in range(VIEWS)]
        places[number] = 1 - places[number]
        assert not gate.check(lazy, rotating.inputs, compared=places, oracle=oracle).passed, number


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


def test_inputs_under_the_clock_are_none_of_those_that_rotate(rotating: Case, rivals: dict[str, Contender]) -> None:
    before, shown = [images.clone() for images in rotating.inputs], []

    def labels(images: Tensor, trace: Trace) -> Tensor:
        shown.append(images.clone())
        return rivals["dense"].labels(images, trace)

    watched = dataclasses.replace(rivals["dense"], labels=labels)
    assert [row.gate for row in measure(rotating, [watched], print_line=lambda line: None)] == ["PASSED"]
    seen, warm, timed = shown[:VIEWS], shown[VIEWS], shown[VIEWS + 1 :]
    assert all(map(torch.equal, seen, before)) and torch.equal(warm, before[0])
    assert len(timed) == 2
    known = [*before, *(images.roll(shift, 1) for images in before for shift in (1, 2))]
    assert not any(torch.equal(images, own) for images in known for own in timed)
    for own, images in zip(timed, before, strict=False):  # colours exchanged, and one factor for all
        factors = [own / images.roll(shift, 1) for shift in (1, 2)]
        assert any(one.min() > 0.9 and one.max() < 1.1 and one.std() < 1e-6 for one in factors)
    assert all(map(torch.equal, rotating.inputs, before))


@pytest.mark.parametrize("where", ["scores", "labels"])
def test_a_timed_answer_is_compared(rotating: Case, rivals: dict[str, Contender], where: str) -> None:
    honest, renewed = rivals["merged"], Renewed(rotating.inputs)
    renewed.write(3)
    labels = honest.labels(rotating.inputs[3], honest.traces[3])
    renewed.keep("merged", 3, labels)
    renewed.restore()
    answer = renewed.answers["merged"]
    assert answer.number == 3 and torch.equal(answer.labels, labels) and answer.labels is not labels
    assert not torch.equal(answer.images, rotating.inputs[3])
    before = rotating.inputs[3].clone()
    assert gate.check_timed(honest, rotating.inputs, answer).passed
    if where == "scores":
        honest = with_scores(honest, lambda scores: scores + 1e-5)
    else:
        answer = dataclasses.replace(answer, labels=(labels + 1) % 150)
    assert not gate.check_timed(honest, rotating.inputs, answer).passed
    assert torch.equal(rotating.inputs[3], before)


def test_one_of_the_timed_answers_is_drawn(rotating: Case) -> None:
    numbers = []
    for _ in range(60):
        renewed = Renewed(rotating.inputs[:1])
        for number in range(3):
            renewed.keep("merged", 0, torch.full((2,), number))
        numbers.append(int(renewed.answers["merged"].labels[0]))
    assert {*numbers} == {0, 1, 2}


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
        "scores of no image": with_scores(honest, lambda scores: scores[:0]),
        "one number": with_scores(honest, lambda scores: scores.sum()),
        "labels of one image only": with_labels(honest, lambda labels: labels[:1]),
        "labels of no image": with_labels(honest, lambda labels: labels[:0]),
        "labels of another size": with_labels(honest, lambda labels: labels[:, ::2, ::2]),
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


def test_failed_contender_is_not_timed_and_has_no_speed_up_anywhere(
    case: Case, contenders: dict[str, Contender]
) -> None:
    def never(images: Tensor, trace: Trace) -> Tensor:
        raise AssertionError("a contender that fails its gate must not be timed")

    calls: list[int] = []

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
