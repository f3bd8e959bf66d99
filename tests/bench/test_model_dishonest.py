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
from bench.model.measure import LATER, STALE, Bench
from bench.model.registry import DENSE, EXITS_EXACT, EXITS_STATIC, EXITS_STATIC_EAGER, MERGED_EXACT, Built, Contender
from bench.model.schema import COST_FIELDS, TIMING_FIELDS
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


FAULTS = [
    wrong,
    half_of_the_blocks,
    one_image_repeated,
    first_answer_again,
    answers_kept_by_input,
    answers_kept_by_memory,
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
    assert cheat.problem == (STALE if "kept" in fault.__name__ else None)
    assert all(map(torch.equal, case.inputs, before))


def test_after_the_clock_comes_after_the_clock() -> None:
    """The two reasons are told apart in the rows."""
    assert LATER != STALE
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
