"""Correctness before speed: errors are measured with plain PyTorch's own, labels with the truth's scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.gate import Expected, Judge, Verdict, largest_error, regret, regret_of_rounding, rounding, worst


def expecting(truth: Tensor, plain: Tensor) -> Expected:
    return Expected(lambda number: (truth,), lambda number: (plain,))


def judged(output: Tensor, truth: Tensor, plain: Tensor, *, ours: bool = True) -> Verdict:
    return Judge()(expecting(truth, plain), 0, (output,), ours=ours)


TRUTH = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
ULP = 2.0**-23  # of float32 between 1 and 2
PLAIN = TRUTH + 10 * ULP


@pytest.mark.parametrize(
    ("ulps", "ours", "rivals"), [(20, True, True), (24, False, True), (80, False, True), (90, False, False)]
)
def test_ours_may_err_twice_and_rivals_eight_times_as_much_as_plain_pytorch(
    ulps: int, ours: bool, rivals: bool
) -> None:
    output, plain = TRUTH.clone(), PLAIN.float()
    output[3] += ulps * ULP
    assert judged(output, TRUTH, plain, ours=True).passed is ours
    assert judged(output, TRUTH, plain, ours=False).passed is rivals


def test_where_plain_pytorch_is_exact_one_rounding_is_allowed() -> None:
    exact = torch.tensor([1.0, 1.5])
    assert judged(exact + ULP, exact.double(), exact).passed
    assert not judged(exact + 3 * ULP, exact.double(), exact).passed


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_integers_and_masks_must_be_equal(dtype: torch.dtype) -> None:
    truth = torch.tensor([0, 1, 1, 0]).to(dtype)
    other = torch.tensor([0, 1, 0, 0]).to(dtype)
    assert judged(truth, truth, truth).passed
    assert not judged(other, truth, truth, ours=False).passed


def test_nothing_is_right_where_the_yardstick_is_no_number() -> None:
    truth = torch.tensor([1.0, math.nan], dtype=torch.float64)
    assert not judged(truth.float(), truth, truth.float()).passed
    infinite = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert not judged(infinite.float(), infinite, infinite.float()).passed


def test_empty_outputs_are_right() -> None:
    assert judged(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64), torch.empty(0, 3)).passed
    assert not judged(torch.empty(0, 4), torch.empty(0, 3, dtype=torch.float64), torch.empty(0, 3)).passed


def test_largest_error_of_plain_pytorch_so_far_is_the_measure() -> None:
    plains = [TRUTH + 10 * ULP, TRUTH.clone()]
    expected, judge = Expected(lambda n: (TRUTH,), lambda n: (plains[n].float(),)), Judge()
    output = TRUTH + 15 * ULP
    assert judge(expected, 0, (output,), ours=True).passed
    assert judge(expected, 1, (output,), ours=True).passed  # plain PyTorch was lucky on this one
    assert not Judge()(expected, 1, (output,), ours=True).passed


def test_worst_output_decides() -> None:
    expected = Expected(lambda n: (TRUTH, TRUTH), lambda n: (PLAIN.float(), PLAIN.float()))
    verdict = Judge()(expected, 0, (TRUTH, TRUTH + 1), ours=True)
    assert not verdict.passed and verdict.error == pytest.approx(1.0)
    assert worst([Verdict(True, 5.0, 10.0), Verdict(True, 1.0, 1.5)]).error == 1.0
    assert worst([Verdict(True, 5.0, 5.0), Verdict(False, 1e-9, 0.0)]).error == 1e-9


def test_errors_and_roundings() -> None:
    assert largest_error(torch.ones(2), torch.ones(3)) == math.inf
    assert largest_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert rounding(torch.tensor([3.0]).double(), torch.bfloat16) == 2 * 2.0**-7
    assert rounding(torch.tensor([3]), torch.float32) == rounding(torch.zeros(2), torch.float32) == 0


SCORES = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 0.5]], dtype=torch.float64)[None, :, None]  # [1, 3, 1, 2]


def test_regret_of_labels() -> None:
    assert regret(torch.tensor([[[1, 0]]]), SCORES).tolist() == [[[0.0, 0.0]]]
    assert regret(torch.tensor([[[1, 1]]]), SCORES).tolist() == [[[0.0, 0.0]]], "a tie is no mistake"
    assert regret(torch.tensor([[[2, 2]]]), SCORES).tolist() == [[[1.0, 0.5]]]


@pytest.mark.parametrize("labels", [[[[1, 3]]], [[[-1, 0]]]])
def test_what_is_no_class_is_infinitely_wrong(labels: list[list[list[int]]]) -> None:
    assert regret(torch.tensor(labels), SCORES).max() == math.inf


def test_labels_of_another_shape_are_infinitely_wrong() -> None:
    assert largest_error(regret(torch.tensor([[1, 0]]), SCORES), torch.zeros(1, 1, 2)) == math.inf


def test_labels_that_rounding_explains_pass_and_others_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 16, 16, generator=generator, dtype=torch.float64)
    plain = scores.bfloat16()
    expected = Expected(
        lambda n: (torch.zeros(2, 16, 16, dtype=torch.float64),), lambda n: (regret_of_rounding(plain, scores).float(),)
    )
    labels = plain.double().argmax(1)
    assert not torch.equal(labels, scores.argmax(1)), "bfloat16 flips some of them"
    assert Judge()(expected, 0, (regret(labels, scores),), ours=True).passed
    labels[0, 3, 3] = scores[0, :, 3, 3].argmin()
    assert not Judge()(expected, 0, (regret(labels, scores),), ours=False).passed
