"""Correctness before speed: each contender against the oracle at the recorded decisions.

The oracle in fp64 is the truth. Every input is run and of each one image is compared: every position of the batch equally often, or,
of a batch larger than the number of inputs, as many positions as there are inputs, evenly spread. Which input shows which position is
drawn anew in every run, so that no contender can know what is looked at and leave out the rest. Two whole inputs of four images would
cost the oracle as much as eight inputs do this way.

What it costs to compute the same in plain PyTorch in the contender's dtype is measured, not guessed: a contender may err by twice
that, plus one unit in the last place of the largest score. The measure is the largest error over one image of each position that is
compared: between single images it was seen to vary by a factor of 2.5. What is not finite, be it the truth, the allowed error or the
contender's, fails.

After the clock one image of one timed answer is compared too, on an input that nobody has seen before, see `bench.renewal`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import StepSegmenter, Trace

from .model.layouts import image_of
from .oracle import segment
from .providers import Contender
from .renewal import Answer

Oracle = Callable[[StepSegmenter, Tensor, Trace], Tensor]

ALLOWED_OVER_PLAIN = 2.0
# Bilinear upsampling is two nested interpolations of two values each: at most four roundings in fp32.
UPSAMPLING_ROUNDINGS = 4


@dataclass(frozen=True)
class Verdict:
    """What the gate found, over all that was compared; errors are those of the image that comes closest to failing.

    Attributes:
        passed: every error is allowed and no label differs.
        max_error: largest absolute error of a class score; infinity for NaN or a wrong shape.
        allowed_error: what `max_error` may be; infinity, which nothing passes, where the oracle is not finite.
        labels_differ: pixels with another label that is no tie.
        decisions_differ: share of the patches that free runs, on the first and the last input, merge or halt differently; None
            where nothing is decided.
        plain_error: of plain PyTorch in the contender's dtype, the largest that was found.
    """

    passed: bool
    max_error: float
    allowed_error: float
    labels_differ: int
    decisions_differ: float | None
    plain_error: float = 0.0


@torch.no_grad()
def check(
    contender: Contender,
    inputs: Sequence[Tensor],
    *,
    compared: Sequence[int] | None = None,
    oracle: Oracle = segment,
    advance: Callable[[str], None] = lambda name: None,
) -> Verdict:
    """Runs the contender on every input at the recorded decisions, and on the first and the last one free as well.

    Args:
        contender: has as many traces as there are inputs.
        inputs: [batch, channels, height, width] each, all of one shape.
        compared: which image of each input; None draws them.
        oracle: what must come out.
        advance: called twice for each input.
    """
    exact_model, batch = copy.deepcopy(contender.model).double(), inputs[0].shape[0]
    compared = draw_images(len(inputs), batch) if compared is None else compared
    truths, plain_error = [], 0.0
    for number, (images, trace, image) in enumerate(zip(inputs, contender.traces, compared, strict=True)):
        own, decisions = images[image : image + 1], image_of(trace, image)
        truths.append(oracle(exact_model, own.double(), decisions))
        if image not in compared[:number]:
            plain_error = max(plain_error, largest_error(oracle(contender.model, own, decisions), truths[-1]))
        advance(contender.name)
    judged = []
    for images, trace, image, truth in zip(inputs, contender.traces, compared, truths, strict=True):
        labels = functools.partial(contender.labels, images, trace)
        judged.append(judge(contender, images, trace, labels, image, truth, plain_error))
        advance(contender.name)
    differing = [
        share_decided_differently(contender.decide(inputs[number]), contender.traces[number])
        for number in sorted({0, len(inputs) - 1})
        if contender.decide is not None
    ]
    worst = max(judged, key=lambda verdict: excess(verdict.max_error, verdict.allowed_error))
    return dataclasses.replace(
        worst,
        passed=all(verdict.passed for verdict in judged),
        labels_differ=sum(verdict.labels_differ for verdict in judged),
        decisions_differ=sum(differing) / len(differing) if differing else None,
        plain_error=plain_error,
    )


@torch.no_grad()
def check_timed(
    contender: Contender,
    inputs: Sequence[Tensor],
    answer: Answer,
    *,
    plain_error: float = 0.0,
    oracle: Oracle = segment,
) -> Verdict:
    """Compares one image, drawn at random, of a timed call's labels, and of scores asked for now with its images in the same memory.

    Args:
        contender: whose answer it is.
        inputs: the rotating ones.
        answer: what was timed.
        plain_error: of plain PyTorch on the inputs of `check`: on one image alone it is a matter of luck.
        oracle: what must come out.
    """
    images, trace = inputs[answer.number], contender.traces[answer.number]
    image, before = random.SystemRandom().randrange(images.shape[0]), images.clone()
    images.copy_(answer.images)
    try:
        own, decisions = images[image : image + 1], image_of(trace, image)
        truth = oracle(copy.deepcopy(contender.model).double(), own.double(), decisions)
        plain_error = max(plain_error, largest_error(oracle(contender.model, own, decisions), truth))
        return judge(contender, images, trace, lambda: answer.labels, image, truth, plain_error)
    finally:
        images.copy_(before)


def draw_images(inputs: int, batch: int) -> tuple[int, ...]:
    """Which image of each input is compared: `spread_images` in an order that nobody knows before."""
    drawn = list(spread_images(inputs, batch))
    random.SystemRandom().shuffle(drawn)
    return tuple(drawn)


def spread_images(inputs: int, batch: int) -> tuple[int, ...]:
    """As many positions in a batch as there are inputs: all of them in turn, or some of a larger batch, the first and the last too."""
    if batch <= inputs:
        return tuple(number % batch for number in range(inputs))
    return tuple(number * (batch - 1) // max(inputs - 1, 1) for number in range(inputs))


def judge(
    contender: Contender,
    images: Tensor,
    trace: Trace,
    ask_for_labels: Callable[[], Any],
    image: int,
    truth: Tensor,
    plain_error: float,
) -> Verdict:
    """Runs the contender on a whole input, scores and then labels, and compares one image of it.

    Args:
        contender: asked for scores.
        images, trace: the input, and the decisions on it.
        ask_for_labels: gives the labels to compare; called last.
        image: number of the compared image.
        truth: its class scores, [1, classes, rows, cols] in fp64.
        plain_error: of plain PyTorch in the contender's dtype.
    """
    allowed = ALLOWED_OVER_PLAIN * plain_error + unit_in_last_place(truth, images.dtype)
    scores = contender.scores(images, trace)
    complete = scores.shape[:1] == images.shape[:1]
    error = largest_error(scores[image : image + 1], truth) if complete else math.inf
    labels = ask_for_labels()
    # A subclass could put its work off to when it is looked at, which under the clock is never.
    if type(labels) is Tensor and labels.shape == (images.shape[0], *images.shape[2:]):
        labels_differ = wrong_labels(labels[image : image + 1], truth, allowed)
    else:
        labels_differ = images[0, 0].numel()
    return Verdict(excess(error, allowed) <= 0 and labels_differ == 0, error, allowed, labels_differ, None)


def excess(error: float, allowed: float) -> float:
    """By how much an error is larger than what is allowed; infinity where one of them is not finite."""
    return error - allowed if math.isfinite(error) and math.isfinite(allowed) else math.inf


def largest_error(values: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinity where it is not a number or the shapes differ."""
    if values.shape != truth.shape:
        return math.inf
    error = float((values.double() - truth).abs().max())
    return math.inf if math.isnan(error) else error


def unit_in_last_place(truth: Tensor, dtype: torch.dtype) -> float:
    """Spacing of `dtype` at the largest magnitude of `truth`; infinity where that is not finite."""
    magnitude = float(truth.abs().max())
    if not math.isfinite(magnitude):
        return math.inf
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude)) if magnitude else 0.0


def wrong_labels(labels: Tensor, truth: Tensor, allowed: float) -> int:
    """Pixels whose label is not the truth's, ties left out.

    Two labels tie where the truth's own scores for them lie within twice the allowed error (one label's score may be too
    high by it, the other's too low): upsampling averages scores, so it does not enlarge their error.

    Args:
        labels: integer [batch, height, width].
        truth: class scores [batch, classes, rows, cols].
        allowed: error of a score that the gate allows.
    """
    classes = truth.shape[1]
    tie = 2 * (allowed + UPSAMPLING_ROUNDINGS * unit_in_last_place(truth, torch.float32))
    wrong = 0
    # One image at a time: full-size scores are large.
    for chosen, scores in zip(labels.long(), truth.float(), strict=True):
        scores = F.interpolate(scores[None], tuple(chosen.shape), mode="bilinear", align_corners=False)[0]
        known = (chosen >= 0) & (chosen < classes)
        score = scores.gather(0, chosen.clamp(0, classes - 1)[None])[0]
        # "Not within" instead of "beyond", so that NaN counts as wrong.
        wrong += int((~known | ~(scores.amax(0) - score <= tie)).sum())
    return wrong


def share_decided_differently(trace: Trace, recorded: Trace) -> float:
    """Share of the patches that end in a block of another side, or that leave at another exit."""
    return float((_fates(trace) != _fates(recorded)).any(0).double().mean())


def _fates(trace: Trace) -> Tensor:
    """int [1 + exits, batch, rows, cols]: the side of the token over each patch at the input and after each exit."""
    return torch.stack([trace.layout.sides(), *(stage.layout.sides() for stage in trace.stages)])
