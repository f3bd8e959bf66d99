"""Under the clock of `bench model`: inputs get other contents in every round, and one round's answers are kept to be compared.

So an answer that was kept from the gate or from an earlier round answers another question, whatever it was kept by, and what is
compared came out of a timed call. All contenders see the same contents in a round: the oracle is asked once for a family.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import oracle
from ..gate import Verdict, excess, largest_error, unit_in_last_place, wrong_labels
from ..renewal import redrawn
from .case import FRONT, MERGED, Case
from .gate import ORACLES, Truths, allowed_factor, exactly, truth_dtype
from .layouts import image_of, rows_of
from .registry import Contender


class TimedRound:
    """One round of the clock, each as likely as the others: its input, contents, and everybody's answer.

    Args:
        inputs: the rotating ones, written in their own memory.
        contenders: how many calls make a round.

    Attributes:
        number: of the input.
        images: a copy of its contents in that round.
        answers: by contender: a copy, or whatever came instead of a tensor.
    """

    number: int
    images: Tensor

    def __init__(self, inputs: Sequence[Tensor], contenders: int) -> None:
        self._inputs, self._originals = inputs, [images.clone() for images in inputs]
        self._contenders, self._calls = contenders, 0
        self._random = random.SystemRandom()  # nobody knows what comes, nor which round it is
        self._kept = False
        self.answers: dict[str, Any] = {}

    def write(self, number: int) -> None:
        """Before a timed call."""
        if self._calls % self._contenders == 0:
            self._contents = redrawn(self._originals[number], self._random)
            self._kept = self._random.randrange(1 + self._calls // self._contenders) == 0
            if self._kept:
                self.number, self.images, self.answers = number, self._contents, {}
        self._calls += 1
        self._inputs[number].copy_(self._contents)

    def keep(self, name: str, number: int, output: Any) -> None:
        """After a timed call, before the next one, with whatever it returned."""
        if self._kept:
            # A copy of what is no plain tensor could be better than what the clock saw: it is judged as it is.
            self.answers[name] = output.clone() if type(output) is Tensor else output

    def restore(self) -> None:
        """Every input as it was."""
        for images, original in zip(self._inputs, self._originals, strict=True):
            images.copy_(original)


class TimedTruths:
    """What must have come out of a `TimedRound`: of one image, drawn at random, worked out once for a family.

    Args:
        case: the comparison.
        timed: the round.
        seen: truths on the inputs of the gate, for the rounding error of plain PyTorch.
    """

    def __init__(self, case: Case, timed: TimedRound, seen: Truths) -> None:
        self._case, self._timed, self._seen = case, timed, seen
        self._image = random.SystemRandom().randrange(case.batch)
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def check(self, contender: Contender) -> Verdict:
        """Labels, or of policy + layout + merge the tokens, that the contender gave under the clock."""
        case, answer = self._case, self._timed.answers[contender.name]
        truth, dtype = self._of(contender.family), case.inputs[0].dtype
        allowed = allowed_factor(contender) * self._seen.of(contender.family)[1] + unit_in_last_place(truth, dtype)
        error, labels_differ = 0.0, 0
        if type(answer) is not Tensor:
            labels_differ = case.size**2
        elif contender.family == FRONT:
            layout = case.traces[self._timed.number].layout
            error = largest_error(answer[rows_of(layout, self._image)], truth)
        elif tuple(answer.shape) != (case.batch, case.size, case.size):
            labels_differ = case.size**2
        else:
            labels_differ = wrong_labels(answer[self._image : self._image + 1], truth.double(), allowed)
        return Verdict(excess(error, allowed) <= 0 and labels_differ == 0, error, allowed, labels_differ, None)

    def _of(self, family: str) -> Tensor:
        if family not in self._known:
            case, here = self._case, slice(self._image, self._image + 1)
            # A short clock leaves no time for fp64; beside the rounding of half precision that of fp32 is nothing.
            dtype = torch.float32 if case.inputs[0].dtype.itemsize == 2 else truth_dtype(case.device)
            exact = copy.deepcopy(case.model(MERGED if family == FRONT else family)).to(dtype)
            trace = image_of(case.decisions(family)[self._timed.number], self._image)
            ask = ORACLES.get(family, oracle.segment)
            self._known[family] = exactly(ask, exact, self._timed.images[here].to(dtype), trace)
        return self._known[family]
