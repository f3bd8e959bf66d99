"""Correctness before speed: class scores and labels against the dense oracle at the recorded decisions.

As in `bench.gate`: the oracle in fp64 is the truth, and an error may be twice that of the oracle in the run's dtype, plus one unit
in the last place of the largest score. Contenders that are not ours get more room for rounding, as in `bench.kernels.gate`: leaving
a fast rival out for the order of a sum would flatter us. Since one image of a large model takes the oracle a second, some images of
some inputs are compared: never those of the first input alone, on which graphs are captured. GPUs that are slow in fp64 compute the
truth in fp32.

After the clock one input is turned over in its own memory: who has kept an answer for it, under whatever name, gives the old one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from step_kernels import use_backend
from step_kernels.model import StepEncoder, StepSegmenter, Trace

from .. import oracle
from ..case import ConfidenceRecorder, threshold_for
from ..gate import (
    ALLOWED_OVER_PLAIN,
    Verdict,
    excess,
    largest_error,
    share_decided_differently,
    unit_in_last_place,
    wrong_labels,
)
from ..kernels.gate import ALLOWED_OVER_PLAIN_FOR_RIVALS
from .case import DENSE, FRONT, MERGED, Case
from .layouts import HALT_SHARE, image_of, rows_of
from .recorded import RecordedPolicy, decide_freely
from .registry import Built, Contender, Decide

INPUTS, IMAGES = 2, 4  # compared: the last ones of the inputs, and this many images of each
FAST_IN_FP64 = ((8, 0), (9, 0), (10, 0))  # compute capabilities: A100, H100 and H200, B200

Oracle = Callable[[StepSegmenter, Tensor, Trace], Tensor]


@dataclass(frozen=True)
class Truth:
    """One image: where it is, what must come out, and the plain error of the run's dtype on it."""

    number: int
    image: int
    scores: Tensor
    rounding: float


class Truths:
    """The oracle's answers for one case, each worked out once, when a contender of its family is first checked.

    Args:
        case: the comparison.
        dense: answers of the dense model to the same inputs from another case, if there is one.
        only_last: one image of the last input is enough.
        others: truths on other inputs, whose plain error counts, too: on one image, it is a matter of luck.
    """

    def __init__(
        self, case: Case, dense: Truths | None = None, *, only_last: bool = False, others: Truths | None = None
    ) -> None:
        self._case, self._dense, self._only_last, self._others = case, dense, only_last, others
        self._known: dict[str, tuple[tuple[Truth, ...], float]] = {}
        self.dtype = truth_dtype(case.device)

    def of(self, family: str) -> tuple[tuple[Truth, ...], float]:
        """The truths, and the error of plain PyTorch in the run's dtype: the largest over the images of one input."""
        if family == DENSE and self._dense is not None:
            return self._dense.of(family)
        if family not in self._known:
            self._known[family] = self._found(family)
        return self._known[family]

    def _found(self, family: str) -> tuple[tuple[Truth, ...], float]:
        case, ask = self._case, ORACLES.get(family, oracle.segment)
        model, traces = case.model(MERGED if family == FRONT else family), case.decisions(family)
        exact = copy.deepcopy(model).to(self.dtype)
        truths, plain = [], 0.0 if self._others is None else self._others.of(family)[1]
        numbers = compared_inputs(len(case.inputs))[-1 if self._only_last else 0 :]
        for number in numbers:
            for image in compared_images(case.batch, number)[-1 if self._only_last else 0 :]:
                images, trace = case.inputs[number][image : image + 1], image_of(traces[number], image)
                scores = exactly(ask, exact, images.to(self.dtype), trace)
                if number == numbers[0]:
                    plain = max(plain, largest_error(ask(model, images, trace), scores))
                truths.append(Truth(number, image, scores, unit_in_last_place(scores, images.dtype)))
        return tuple(truths), plain

    @functools.cached_property
    def free(self) -> tuple[Tensor, Trace, float]:
        """Images (one), what exits decide there when nothing is replayed and nothing rounded, and the threshold that makes them."""
        case, weights, policy = self._case, self._case.weights, RecordedPolicy(None)
        images, trace = case.inputs[-1][:1], image_of(case.traces[-1], 0)
        vit, decoder = copy.deepcopy(weights.vit).to(self.dtype), copy.deepcopy(weights.decoder).to(self.dtype)
        ((block, head),) = weights.exits.items()
        head, policy.layout = copy.deepcopy(head).to(self.dtype), trace.layout
        recorder, precise = ConfidenceRecorder(head), images.to(self.dtype)
        with use_backend("reference"), torch.no_grad():
            StepEncoder(vit, policy, {block: recorder}).eval()(precise)
            threshold = threshold_for(recorder.confidence, round(HALT_SHARE * recorder.confidence.numel()))
            truth = decide_freely(vit, decoder, {block: head}, precise, trace.layout, threshold)
        return images, truth, threshold

    def share_decided_differently(self, decide: Decide) -> float:
        """Of the patches of one image, those that a contender's free run halts where the truth's does not, or the reverse."""
        images, truth, threshold = self.free
        return share_decided_differently(decide(images, truth.layout, threshold), truth)


@dataclass(frozen=True)
class Answers:
    """What the oracle says of a case: on the inputs of the clock, and on one that nobody has seen before it."""

    seen: Truths
    unseen: Truths

    @classmethod
    def of(cls, case: Case, dense: Answers | None = None) -> Answers:
        """Of a case; those of its dense model may be there from another kind of layouts."""
        seen, unseen = (None, None) if dense is None else (dense.seen, dense.unseen)
        inputs = Truths(case, seen)
        return cls(inputs, Truths(case, unseen, only_last=True, others=inputs))

    def ask(self, case: Case, family: str) -> None:
        """Works them out, before a contender of the family takes the memory that the oracle needs."""
        self.seen.of(family)
        with turned_over(case):
            self.unseen.of(family)


def exactly(ask: Oracle, model: StepSegmenter, images: Tensor, trace: Trace) -> Tensor:
    """An oracle's answer without TF32, to which a GPU may round the convolutions of an fp32 truth."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return ask(model, images, trace)


@contextlib.contextmanager
def turned_over(case: Case) -> Iterator[None]:
    """In this context the last input shows its images upside down; recorded decisions stay."""
    images = case.inputs[-1]
    images.copy_(images.flip(-2))
    try:
        yield
    finally:
        images.copy_(images.flip(-2))


def tokens_of(model: StepSegmenter, images: Tensor, trace: Trace) -> Tensor:
    """The oracle of policy + layout + merge: [T, D], the embedded tokens of one image."""
    with torch.no_grad():
        tokens, keys = oracle.embed(
            model.encoder, images, trace.layout.grid, oracle.blocks_of_images(trace, images.shape[0])
        )
    return tokens[keys]


ORACLES: dict[str, Oracle] = {FRONT: tokens_of}


@torch.no_grad()
def check(case: Case, contender: Contender, built: Built, truths: Truths, *, free: bool = False) -> Verdict:
    """Scores, then labels, of every compared image; each is looked at before the next call may overwrite it.

    Args:
        free: whether decisions of a run without recorded ones are compared as well.
    """
    factor = allowed_factor(contender)
    expected, plain = truths.of(contender.family)
    judged, labels_differ = [], 0
    for number in dict.fromkeys(truth.number for truth in expected):
        own = [truth for truth in expected if truth.number == number]
        scores = built.scores(number)
        for truth in own:
            found = _part(case, contender.family, scores, truth)
            judged.append((largest_error(found, truth.scores), factor * plain + truth.rounding))
        if contender.family == FRONT:
            continue
        labels = built.labels(number)
        for truth in own:
            shown = labels[truth.image : truth.image + 1]
            if tuple(shown.shape) != (1, case.size, case.size):
                labels_differ += case.size**2
            else:
                labels_differ += wrong_labels(shown, truth.scores.double(), factor * plain + truth.rounding)
    error, allowed = max(judged, key=lambda pair: excess(*pair))
    passed = all(excess(*pair) <= 0 for pair in judged) and labels_differ == 0
    differ = truths.share_decided_differently(built.decide) if free and passed and built.decide is not None else None
    return Verdict(passed, error, allowed, labels_differ, decisions_differ=differ)


def allowed_factor(contender: Contender) -> float:
    """How many times the rounding error of plain PyTorch it may be off."""
    return ALLOWED_OVER_PLAIN if contender.ours else ALLOWED_OVER_PLAIN_FOR_RIVALS


def _part(case: Case, family: str, scores: Tensor, truth: Truth) -> Tensor:
    if family == FRONT:
        return scores[rows_of(case.traces[truth.number].layout, truth.image)]
    return scores[truth.image : truth.image + 1]


def compared_inputs(inputs: int) -> tuple[int, ...]:
    """The last of the inputs."""
    return tuple(range(max(0, inputs - INPUTS), inputs))


def compared_images(batch: int, number: int) -> tuple[int, ...]:
    """Images of one input, the first or the last among them, others for the next input."""
    if batch <= IMAGES:
        return tuple(range(batch))
    return tuple(sorted({(step * (batch - 1) // (IMAGES - 1) + number % 2 * step) % batch for step in range(IMAGES)}))


def truth_dtype(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on a GPU that computes fp64 at a small part of its speed."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_IN_FP64:
        return torch.float32
    return torch.float64
