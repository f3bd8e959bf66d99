"""Correctness before speed: every output of a contender against the reference in fp64, on the first two inputs and the last.

An error of step_kernels may be twice that of the PyTorch reference in the run's dtype, plus one unit in the last place of the
largest output; integers and booleans must be equal. What is not finite fails. The PyTorch contenders get more room for rounding,
because a sum in another order is no mistake and because leaving a fast rival out for it would flatter us.

The job calls `check` before the clock and once more after it, on canvases that have been wiped in between, and `check_answer` on what
one of the timed calls gave, nobody knows which: a contender that works for the gate alone is caught. Then the last input gets other
numbers in its own memory: who has kept an answer for it, under its number or its address, gives the old one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from step_kernels import use_backend

from ..gate import ALLOWED_OVER_PLAIN, excess, largest_error, unit_in_last_place
from .answers import Answer
from .contenders import Contender, reference_of
from .examples import Example
from .operation import Operation, Outputs

# Seen: a compiled sum over 200 rows, one after the other, at 2.5 times the error of PyTorch's own pairwise one. Sums kept in
# bfloat16 instead of fp32 are off by a hundred times and more.
ALLOWED_OVER_PLAIN_FOR_RIVALS = 8.0


@dataclass(frozen=True)
class Limit:
    """What one output may be off by.

    Attributes:
        plain: the largest error of the PyTorch reference in the run's dtype, over all that are compared: on one, it is a matter of luck.
        rounding: of the result itself.
    """

    plain: float
    rounding: float

    def of(self, contender: Contender) -> float:
        """The error that passes."""
        factor = ALLOWED_OVER_PLAIN if contender.ours else ALLOWED_OVER_PLAIN_FOR_RIVALS
        return factor * self.plain + self.rounding


@dataclass(frozen=True)
class Truth:
    """What one input must give: its number, outputs in fp64 (or integers), the limit of each one's error, and the input in fp64."""

    number: int
    outputs: Outputs
    limits: tuple[Limit, ...]
    example: Example


@dataclass(frozen=True)
class Verdict:
    """The output that comes closest to failing, over all compared inputs; infinite errors for NaN, wrong shapes or missing outputs."""

    passed: bool
    max_error: float
    allowed_error: float


def find_truths(operation: Operation, direction: str, exact: Sequence[Example], dtype: torch.dtype) -> list[Truth]:
    """The reference in fp64, and what the reference in the run's dtype is off by, on the inputs that are compared."""
    compared = {number: exact[number] for number in compared_inputs(len(exact))}
    return _with_common_limits(_found(operation, direction, compared, dtype), [])


def compared_inputs(count: int) -> tuple[int, ...]:
    """Of so many inputs: the first ones, which every clock reaches, and the last, which gets other numbers after it."""
    return tuple(sorted({*range(min(2, count)), count - 1}))


def find_new_truth(
    operation: Operation, direction: str, exact: Sequence[Example], dtype: torch.dtype, before: Sequence[Truth]
) -> list[Truth]:
    """The truth of the last input, which has got other numbers since `before` was found."""
    last = len(exact) - 1
    return _with_common_limits(_found(operation, direction, {last: exact[last]}, dtype), before)


def _found(operation: Operation, direction: str, exact: Mapping[int, Example], dtype: torch.dtype) -> list[Truth]:
    truths = []
    with use_backend("reference"):
        for number, example in exact.items():
            precise = example.double()
            outputs = _outputs(operation, reference_of(operation, direction, [precise]), 0, precise)
            peer = reference_of(operation, direction, [example])
            peer.examples[0].reset()
            raw = peer.live(peer(0), peer.examples[0])
            peers = operation.judged(raw, precise)
            limits = []
            for truth, own, stored in zip(outputs, peers, raw, strict=True):
                stored_as = stored.dtype if stored.is_floating_point() else dtype
                limits.append(Limit(_error(own, truth), _rounding(operation, truth, stored_as)))
            truths.append(Truth(number, outputs, tuple(limits), precise))
    return truths


def _with_common_limits(truths: Sequence[Truth], others: Sequence[Truth]) -> list[Truth]:
    """The plain error of each output is the largest on any input, those of `others` included."""
    every = [truth.limits for truth in (*truths, *others)]
    worst = [max(limit.plain for limit in same) for same in zip(*every, strict=True)]
    return [dataclasses.replace(truth, limits=tuple(map(_with_plain, worst, truth.limits))) for truth in truths]


def check(operation: Operation, contender: Contender, truths: Sequence[Truth]) -> Verdict:
    """Runs the contender on the input of every truth, in order."""
    judged = []
    for truth in truths:
        judged += _judged(contender, _outputs(operation, contender, truth.number, truth.example), truth)
    return _verdict(judged)


@torch.no_grad()
def check_answer(operation: Operation, contender: Contender, answer: Answer, truths: Sequence[Truth]) -> Verdict:
    """What a timed call gave."""
    (truth,) = (truth for truth in truths if truth.number == answer.number)
    return _verdict(_judged(contender, operation.judged(answer.outputs, truth.example), truth))


def _judged(contender: Contender, outputs: Outputs, truth: Truth) -> list[tuple[float, float]]:
    """Error and what is allowed, of each output."""
    if len(outputs) != len(truth.outputs):
        return [(math.inf, 0.0)]
    errors = [_error(own, exact) for own, exact in zip(outputs, truth.outputs, strict=True)]
    return list(zip(errors, [limit.of(contender) for limit in truth.limits], strict=True))


def _verdict(judged: Sequence[tuple[float, float]]) -> Verdict:
    error, allowed = max(judged, key=_urgency)
    return Verdict(all(excess(*pair) <= 0 for pair in judged), error, allowed)


def _outputs(operation: Operation, contender: Contender, number: int, precise: Example) -> Outputs:
    example = contender.examples[number]
    example.reset()
    outputs = contender.live(contender(number), example)
    with torch.no_grad():
        return operation.judged(outputs, precise)


def _with_plain(plain: float, limit: Limit) -> Limit:
    return dataclasses.replace(limit, plain=plain)


def _rounding(operation: Operation, truth: torch.Tensor, dtype: torch.dtype) -> float:
    if not truth.is_floating_point() or truth.numel() == 0:
        return 0.0
    return unit_in_last_place(truth, dtype) + operation.slack * unit_in_last_place(truth, torch.float32)


def _error(values: torch.Tensor, truth: torch.Tensor) -> float:
    if values.shape == truth.shape and truth.numel() == 0:
        return 0.0
    return largest_error(values.detach(), truth.double())


def _urgency(pair: tuple[float, float]) -> tuple[float, float]:
    """By how much a limit is exceeded; below it, which share of it is used up."""
    error, allowed = pair
    over = excess(error, allowed)
    return (over, math.inf) if over > 0 else (0.0, error / allowed if allowed else 0.0)
