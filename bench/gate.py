"""Correctness before speed: each contender against the oracle at the recorded decisions.

The oracle in fp64 is the truth, on every input. What it costs to compute the same in plain PyTorch in the contender's dtype
is measured, not guessed: a contender may err by twice that, plus one unit in the last place of the largest score. It is
measured on the first input only, which saves time: the others show the same subjects, and over two inputs it was seen to
vary by a quarter at most. What is not finite, be it the truth, the allowed error or the contender's, fails.

After the clock one image of a batch that has been turned over in its own memory is compared too: who has kept an answer for that
input, under whatever name, gives the old one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import StepSegmenter, Trace

from .model.layouts import image_of
from .oracle import segment
from .providers import Contender

Oracle = Callable[[StepSegmenter, Tensor, Trace], Tensor]

ALLOWED_OVER_PLAIN = 2.0
# Bilinear upsampling is two nested interpolations of two values each: at most four roundings in fp32.
UPSAMPLING_ROUNDINGS = 4


@dataclass(frozen=True)
class Verdict:
    """What the gate found, over all inputs; errors are those of the input that comes closest to failing.

    Attributes:
        passed: every error is allowed and no label differs.
        max_error: largest absolute error of a class score; infinity for NaN or a wrong shape.
        allowed_error: what `max_error` may be; infinity, which nothing passes, where the oracle is not finite.
        labels_differ: pixels with another label that is no tie.
        decisions_differ: share of the patches that a free run merges or halts differently; None where nothing is decided.
    """

    passed: bool
    max_error: float
    allowed_error: float
    labels_differ: int
    decisions_differ: float | None


@torch.no_grad()
def check(
    contender: Contender,
    inputs: Sequence[Tensor],
    *,
    oracle: Oracle = segment,
    advance: Callable[[str], None] = lambda name: None,
) -> Verdict:
    """Runs the contender on every input at the recorded decisions, and once more free to compare the decisions."""
    exact_model = copy.deepcopy(contender.model).double()
    plain_error: float | None = None
    judged: list[tuple[float, float]] = []
    labels_differ = 0
    differing: list[float] = []
    for images, trace in zip(inputs, contender.traces, strict=True):
        truth = oracle(exact_model, images.double(), trace)
        if plain_error is None:
            plain_error = largest_error(oracle(contender.model, images, trace), truth)
        allowed = ALLOWED_OVER_PLAIN * plain_error + unit_in_last_place(truth, images.dtype)
        judged.append((largest_error(contender.scores(images, trace), truth), allowed))
        labels_differ += wrong_labels(contender.labels(images, trace), truth, allowed)
        if contender.decide is not None:
            differing.append(share_decided_differently(contender.decide(images), trace))
        advance(contender.name)
    error, allowed = max(judged, key=lambda pair: excess(*pair))
    return Verdict(
        passed=excess(error, allowed) <= 0 and labels_differ == 0,
        max_error=error,
        allowed_error=allowed,
        labels_differ=labels_differ,
        decisions_differ=sum(differing) / len(differing) if differing else None,
    )


@torch.no_grad()
def check_unseen(contender: Contender, inputs: Sequence[Tensor], *, oracle: Oracle = segment) -> Verdict:
    """Turns the last input upside down in place, checks the contender's scores and labels of its last image, turns it back."""
    images, trace = inputs[-1], contender.traces[-1]
    images.copy_(images.flip(-2))
    try:
        last, own = images[-1:], image_of(trace, images.shape[0] - 1)
        truth = oracle(copy.deepcopy(contender.model).double(), last.double(), own)
        plain_error = largest_error(oracle(contender.model, last, own), truth)
        allowed = ALLOWED_OVER_PLAIN * plain_error + unit_in_last_place(truth, images.dtype)
        error = largest_error(contender.scores(images, trace)[-1:], truth)
        labels_differ = wrong_labels(contender.labels(images, trace)[-1:], truth, allowed)
    finally:
        images.copy_(images.flip(-2))
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
    batch, classes = truth.shape[:2]
    if labels.ndim != 3 or labels.shape[0] != batch:
        return labels.numel()
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
