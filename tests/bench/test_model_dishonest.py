"""Contenders of `bench model` that cheat: they show FAILED and no speed-up, whatever it is that they save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_model_cases import contender, eager_graphs, nano_case, nano_preset, nano_settings
from torch import Tensor

from bench.kernels.plain import upsample_argmax
from bench.model import gate, registry
from bench.model.case import Case
from bench.model.measure import LATER, STALE, TIMED, Bench
from bench.model.registry import (
    DENSE,
    EXITS_EXACT,
    EXITS_STATIC,
    EXITS_STATIC_EAGER,
    FRONT,
    MERGED_EXACT,
    Built,
    Contender,
)
from bench.model.schema import COST_FIELDS, TIMING_FIELDS
from bench.model.timed import TimedRound, TimedTruths
from bench.schema import FAILED, PASSED


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


def from_scores(built: Built, scores: Callable[[int], Tensor], case: Case) -> Built:
    """Labels are made of the same scores, as a contender that saves the work would make them."""
    return dataclasses.replace(
        built, scores=scores, labels=lambda number: upsample_argmax(scores(number), (case.size, case.size))
    )


def wrong(built: Built, case: Case) -> Built:
    return from_scores(built, lambda number: -built.scores(number), case)


def half_of_the_blocks(built: Built, case: Case) -> Built:
    vit = case.weights.vit

    def scores(number: int) -> Tensor:
        blocks = vit.blocks
        vit.blocks = blocks[: len(blocks) // 2]
        try:
            return built.scores(number)
        finally:
            vit.blocks = blocks

    return from_scores(built, scores, case)


def one_image_repeated(built: Built, case: Case) -> Built:
    return from_scores(built, lambda number: built.scores(number)[:1].expand(case.batch, -1, -1, -1), case)


def first_answer_again(built: Built, case: Case) -> Built:
    kept = built.scores(0).clone()
    return from_scores(built, lambda number: kept, case)


def answers_kept_by_input(built: Built, case: Case) -> Built:
    """Right about every input that it has seen, and never computes one twice."""
    kept: dict[int, Tensor] = {}

    def scores(number: int) -> Tensor:
        if number not in kept:
            kept[number] = built.scores(number).clone()
        return kept[number]

    return from_scores(built, scores, case)


def answers_kept_by_memory(built: Built, case: Case) -> Built:
    """The same by address, for a contender that is not told the number."""
    kept: dict[int, Tensor] = {}

    def scores(number: int) -> Tensor:
        return kept.setdefault(case.inputs[number].data_ptr(), built.scores(number).clone())

    return from_scores(built, scores, case)


def answers_kept_by_content(built: Built, case: Case) -> Built:
    """Works for the gate and remembers what it has seen there; under the clock it hopes for the same images."""
    kept: dict[float, Tensor] = {}
    asked: list[int] = []

    def scores(number: int) -> Tensor:
        key = float(case.inputs[number].double().sum())
        asked.append(number)
        if key not in kept and len(asked) > 2 * gate.INPUTS:
            return next(iter(kept.values()))
        return kept.setdefault(key, built.scores(number).clone())

    return from_scores(built, scores, case)


def zeros_when_nobody_looks(built: Built, case: Case) -> Built:
    """Only the gate asks for scores, and for labels right after it."""
    watched: list[bool] = []

    def scores(number: int) -> Tensor:
        watched.append(True)
        return built.scores(number)

    def labels(number: int) -> Tensor:
        if watched:
            watched.clear()
            return built.labels(number)
        return torch.zeros(case.batch, case.size, case.size, dtype=torch.uint8)

    return dataclasses.replace(built, scores=scores, labels=labels)


def nothing_when_nobody_looks(built: Built, case: Case) -> Built:
    """The same, and not even a tensor."""
    honest = zeros_when_nobody_looks(built, case)
    return dataclasses.replace(
        honest,
        labels=lambda number: found if (found := honest.labels(number)).any() else None,  # type: ignore[arg-type, return-value]
    )


UNDER_THE_CLOCK = [
    answers_kept_by_input,
    answers_kept_by_memory,
    answers_kept_by_content,
    zeros_when_nobody_looks,
    nothing_when_nobody_looks,
]
FAULTS = [
    wrong,
    half_of_the_blocks,
    one_image_repeated,
    first_answer_again,
    *UNDER_THE_CLOCK,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_dishonest_contender_is_failed_and_gets_no_speed_up(
    fault: Callable[[Built, Case], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Contender.build

    def build(one: Contender, case: Any) -> Built:
        built = real(one, case)
        return fault(built, case) if one.name == MERGED_EXACT else built

    monkeypatch.setattr(Contender, "build", build)
    case = nano_case()
    before = [images.clone() for images in case.inputs]
    dense, honest, cheat = Bench(nano_settings(contenders=(DENSE, EXITS_EXACT, MERGED_EXACT))).measure(
        case, float("inf")
    )
    assert (dense.gate, honest.gate, cheat.gate) == (PASSED, PASSED, FAILED)
    assert honest.speedup is not None
    assert all(getattr(cheat, name) is None for name in (*TIMING_FIELDS, *COST_FIELDS))
    if fault not in UNDER_THE_CLOCK:
        assert cheat.problem is None
    elif (
        "kept" in fault.__name__
    ):  # the timed answer that is drawn may be alike for both contents: then the next check finds it
        assert cheat.problem in (TIMED, STALE)
    else:
        assert cheat.problem == TIMED
    assert all(map(torch.equal, case.inputs, before))


def test_after_the_clock_comes_after_the_clock() -> None:
    """The reasons are told apart in the rows."""
    assert len({TIMED, LATER, STALE}) == 3
    case = nano_case()
    truths = gate.Truths(case, only_last=True)
    with gate.turned_over(case):
        expected, _ = truths.of("merged")
    (truth,) = expected
    assert (truth.number, truth.image) == (len(case.inputs) - 1, case.batch - 1)
    seen = gate.Truths(case, only_last=True).of("merged")[0][0]
    assert not torch.allclose(seen.scores, truth.scores, atol=1e-3)


@pytest.mark.parametrize("name", [EXITS_EXACT, EXITS_STATIC_EAGER, EXITS_STATIC])
def test_free_decisions_are_those_of_the_oracle(name: str) -> None:
    case = nano_case()
    truths = gate.Truths(case)
    images, truth, threshold = truths.free
    assert images.shape[0] == 1 and 0 < threshold < 1
    left = (truth.stages[0].layout.lengths() - 1).sum() / (truth.layout.lengths() - 1).sum()
    assert float(left) == pytest.approx(0.6, abs=0.15)  # of few tokens
    with eager_graphs():
        built = contender(name).build(case)
        verdict = gate.check(case, contender(name), built, truths, free=True)
    assert verdict.passed and verdict.decisions_differ == 0.0
    assert truths.share_decided_differently(lambda *given: built.decide(given[0], given[1], 0.0)) > 0.1
    assert gate.check(case, contender(name), built, truths).decisions_differ is None


def test_who_decides_nothing_reports_nothing() -> None:
    case = nano_case()
    truths = gate.Truths(case)
    for name in (DENSE, MERGED_EXACT, registry.PARTS):
        built = contender(name).build(case)
        assert gate.check(case, contender(name), built, truths, free=True).decisions_differ is None


def test_a_round_is_the_same_question_to_everybody_and_never_asked_before() -> None:
    inputs = tuple(torch.randn(2, 3, 4, 4) for _ in range(3))
    before, kept = [images.clone() for images in inputs], set()
    for _ in range(40):
        timed, asked = TimedRound(inputs, 2), []
        for number in (0, 1, 2):
            for name in ("a", "b"):
                timed.write(number)
                asked.append(inputs[number].clone())
                timed.keep(name, number, torch.full((2,), float(number)))
        for one, other in zip(asked[::2], asked[1::2], strict=True):
            assert torch.equal(one, other)
        assert not any(torch.equal(asked[2 * number], before[number]) for number in range(3))
        assert torch.equal(timed.images, asked[2 * timed.number])
        assert {name: answer.tolist() for name, answer in timed.answers.items()} == dict.fromkeys(
            "ab", [timed.number] * 2
        )
        kept.add(timed.number)
        timed.restore()
        assert all(map(torch.equal, inputs, before))
    assert kept == {0, 1, 2}


@pytest.mark.parametrize("name", [FRONT, MERGED_EXACT, EXITS_EXACT, DENSE])
def test_a_timed_answer_is_held_to_the_oracle(name: str) -> None:
    case = nano_case()
    built, one = contender(name).build(case), contender(name)
    timed = TimedRound(case.inputs, 1)
    timed.write(1)
    answer = built.labels(1)
    timed.keep(name, 1, answer)
    timed.restore()
    truths = TimedTruths(case, timed, gate.Truths(case))
    assert truths.check(one).passed
    for wrong_answer in (answer[:1], answer.flip(0), torch.zeros_like(answer), None, built.labels(1)):
        timed.answers[name] = wrong_answer
        assert not truths.check(one).passed


def test_an_input_that_is_turned_over_is_held_to_no_luckier_yardstick() -> None:
    """Plain PyTorch may be almost exact on its one image; seen: an honest contender that failed for it."""
    case = nano_case()
    for family in ("dense", "merged"):
        alone = gate.Truths(case, only_last=True)
        answers = gate.Answers.of(case)
        answers.ask(case, family)
        with gate.turned_over(case):
            of_one_image = alone.of(family)[1]
        assert answers.unseen.of(family)[1] == max(of_one_image, answers.seen.of(family)[1])


def test_truths_are_worked_out_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds fp32 convolutions to it unless told; the yardstick of plain PyTorch keeps the user's setting."""
    allowed: dict[torch.dtype, set[bool]] = {}
    real = gate.oracle.segment

    def segment(model: Any, images: Tensor, trace: Any) -> Tensor:
        allowed.setdefault(images.dtype, set()).add(torch.backends.cudnn.allow_tf32)
        return real(model, images, trace)

    monkeypatch.setattr(gate.oracle, "segment", segment)
    case = nano_case(dtype="bfloat16")
    truths, timed = gate.Truths(case), TimedRound(case.inputs, 1)
    truths.of("merged")
    timed.write(0)
    timed.keep(MERGED_EXACT, 0, contender(MERGED_EXACT).build(case).labels(0))
    assert TimedTruths(case, timed, truths).check(contender(MERGED_EXACT)).passed
    assert allowed == {torch.float64: {False}, torch.bfloat16: {True}, torch.float32: {False}}
    assert torch.backends.cudnn.allow_tf32
