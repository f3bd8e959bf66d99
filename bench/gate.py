"""Correctness before speed: a contender may err by a multiple of what plain PyTorch in the same dtype errs by, plus one rounding.

Labels are judged by regret: how much the truth's best score lies above the truth's score of the chosen label. Ties have none, so that
labels, masks, gradients, integers and scores are one comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
OURS_OVER_PLAIN = 2.0
# A sum in another order is no mistake, and leaving a fast rival out for it would flatter us. Seen: 2.5 for a compiled sum.
RIVAL_OVER_PLAIN = 8.0


@dataclass(frozen=True)
class Expected:
    """What must come out for each input."""

    truth: Callable[[int], Outputs]  # in fp64; integers and masks as they are: they must be equal
    plain: Callable[[int], Outputs]  # the same in plain PyTorch and the run's dtype: the yardstick of errors


class Verdict(NamedTuple):
    """The output that comes closest to failing."""

    passed: bool
    error: float
    allowed: float


class Judge:
    """Asks for the truth of an input once, whoever is judged by it, and only when somebody is."""

    def __init__(self) -> None:
        self._known: dict[tuple[Expected, int], tuple[Outputs, Outputs]] = {}
        self._errors: dict[Expected, list[float]] = {}

    def __call__(self, expected: Expected, number: int, outputs: Outputs, *, ours: bool) -> Verdict:
        truths, plains = self._answers(expected, number)
        if len(outputs) != len(truths):
            return Verdict(False, math.inf, 0.0)
        factor = OURS_OVER_PLAIN if ours else RIVAL_OVER_PLAIN
        verdicts = []
        for output, truth, plain, plain_error in zip(outputs, truths, plains, self._errors[expected], strict=True):
            allowed = factor * plain_error + rounding(truth, plain.dtype)
            error = largest_error(output, truth)
            verdicts.append(Verdict(math.isfinite(allowed) and error <= allowed, error, allowed))
        return worst(verdicts)

    def _answers(self, expected: Expected, number: int) -> tuple[Outputs, Outputs]:
        key = expected, number
        if key not in self._known:
            truths, plains = expected.truth(number), expected.plain(number)
            found = [largest_error(plain, truth) for plain, truth in zip(plains, truths, strict=True)]
            # Plain PyTorch's error on one input is a matter of luck: the largest one so far is the measure.
            before = self._errors.get(expected, [0.0] * len(found))
            self._errors[expected] = [max(pair) for pair in zip(before, found, strict=True)]
            self._known[key] = truths, plains
        return self._known[key]


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda v: (not v.passed, v.error / v.allowed if v.allowed else v.error))


def largest_error(values: Tensor, truth: Tensor) -> float:
    """Infinity for another shape or a NaN."""
    if values.shape != truth.shape:
        return math.inf
    if truth.numel() == 0:
        return 0.0
    error = float((values.double() - truth.double()).abs().max())
    return math.inf if math.isnan(error) else error


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of the largest magnitude; none for what must be equal."""
    if not truth.is_floating_point() or not dtype.is_floating_point or truth.numel() == 0:
        return 0.0
    magnitude = float(truth.abs().max())
    if not math.isfinite(magnitude):
        return math.inf
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude)) if magnitude else 0.0


def regret(labels: Tensor, scores: Tensor) -> Tensor:
    """[batch, height, width]: zero where the label is the truth's best; infinite where it is no class or another shape.

    Of integers [batch, height, width] and the truth's scores [batch, classes, height, width], fp64.
    """
    if labels.shape != (scores.shape[0], *scores.shape[2:]):
        return scores.new_full((), math.inf)
    known = (labels >= 0) & (labels < scores.shape[1])
    chosen = scores.gather(1, labels.clamp(0, scores.shape[1] - 1).long()[:, None])[:, 0]
    return torch.where(known, scores.amax(1) - chosen, math.inf)


def regret_of_rounding(plain: Tensor, scores: Tensor) -> Tensor:
    """The regret that plain PyTorch's errors explain, as `plain` of labels whose truth is no regret at all.

    Of plain PyTorch's scores [batch, classes, ...] in the run's dtype and the truth's in fp64: one may be too high by the largest error and
    another too low by it, each rounded once more when it is upsampled.
    """
    bound = 2 * (largest_error(plain, scores) + rounding(scores, plain.dtype))
    return torch.full_like(scores[:, 0], bound)
