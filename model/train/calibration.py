"""Thresholds for what is wanted: so many tokens, blocks so pure, so many halted, at most so much accuracy lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_number
from ..policies.base import Policy, fitting_sides
from ..policies.calibration import TokenCounts
from ..policies.net import PolicyNet
from ..policies.oracle import PURE, UNLABELLED, block_purity
from ..segmenter import StepSegmenter
from ..windows import Runs, crops_of, predict_windows
from .metrics import Confusion

__all__ = ["calibrate_exits", "calibrate_policy"]

Batches = Iterable[tuple[Tensor, Tensor | None]]
HALVINGS, LIMIT = 9, 14.0  # of the range of thresholds, and its upper end as a logit
NEAR = 0.005  # below the wanted share of tokens, and close enough; of small shares a twentieth


@torch.no_grad()
def calibrate_policy(
    segmenter: StepSegmenter,
    batches: Batches,
    *,
    reduction: float | None = None,
    purity: float | None = None,
    ignore_index: int = 255,
) -> list[float]:
    """Set the thresholds of the segmenter's `PolicyNet`, in place.

    Args:
        segmenter: on its device, in its dtype.
        batches: read once: (images [B, C, H, W], normalised; labels integer [B, H, W], which only ``purity`` needs).
        reduction: how many times fewer tokens than patches, by one threshold for all sides; as close as the pictures allow.
        purity: share of a side's taken blocks that hold one class, from 0 to 1, by the lowest threshold per side that reaches it; 1 where
            none does, which takes no block.
        ignore_index: label of pixels that do not count.

    Returns:
        The thresholds, sides ascending.

    Raises:
        TypeError: the policy is no `PolicyNet`.
        ValueError: both or neither of ``reduction`` and ``purity``, one out of range, no pictures, or no labels where they are needed.
    """
    policy = segmenter.encoder.policy
    if not isinstance(policy, PolicyNet):
        raise TypeError(f"segmenter: expected one with a PolicyNet, got {type(policy).__name__}")
    if (reduction is None) == (purity is None):
        raise ValueError("reduction: expected one of reduction and purity, got both or neither")
    seen = list(scored(segmenter, policy, batches, ignore_index, purity is not None))
    if not seen:
        raise ValueError("batches: expected at least one picture, got none")
    if purity is not None:
        found = by_purity(seen, policy, check_number("purity", purity, minimum=0, maximum=1))
    else:
        counts = TokenCounts()
        for scores, _, sides, cells in seen:
            counts.add([1 - each for each in scores], sides, cells)  # as deviations: 0 takes no block
        threshold = 1 - float(counts.threshold(check_number("reduction", reduction, minimum=1)))
        found = [min(max(threshold, 0.0), 1.0)] * len(policy.sides)
    policy.thresholds = found  # type: ignore[assignment]  # fills the buffer
    return found


Scored = tuple[list[Tensor], list[Tensor], list[int], int]


def scored(
    segmenter: StepSegmenter, policy: Policy, batches: Batches, ignore_index: int, labelled: bool
) -> Iterable[Scored]:
    """Of each batch, on the CPU: scores and purity per side, the sides, the number of patches."""
    vit = segmenter.encoder.vit
    for images, labels in batches:
        pixels, grid = vit.on_grid(crops_of(segmenter, images, None, None)[2])
        sides = fitting_sides(policy.sides, grid)
        scores = [each.float().cpu() for each in policy.scores(pixels, patch_size=vit.patch_size)]
        pure: list[Tensor] = []
        if labelled:
            if labels is None:
                raise ValueError("batches: expected labels, which purity needs, got none")
            own = crops_of(segmenter, labels[:, None], None, None)[2][:, 0]
            pure = block_purity(own.cpu(), policy.sides, patch_size=vit.patch_size, ignore_index=ignore_index)
        yield scores, pure, sides, pixels.shape[0] * grid[0] * grid[1]


def by_purity(seen: list[Scored], policy: PolicyNet, wanted: float) -> list[float]:
    """Per side the lowest threshold above which so many of the labelled blocks are pure."""
    found = []
    for side in policy.sides:
        pairs = [
            (scores[sides.index(side)], pure[sides.index(side)]) for scores, pure, sides, _ in seen if side in sides
        ]
        kept = [(scores[pure != UNLABELLED], pure[pure != UNLABELLED] == PURE) for scores, pure in pairs]
        scores = torch.cat([scores for scores, _ in kept]) if kept else torch.empty(0)
        if not len(scores):
            found.append(1.0)
            continue
        scores, order = scores.sort(descending=True, stable=True)
        taken = torch.arange(1, len(scores) + 1, device="cpu")
        share = torch.cat([pure for _, pure in kept])[order].double().cumsum(0) / taken
        below = F.pad(scores[1:], (0, 1))
        good = ((share >= wanted) & (scores > below)).nonzero()  # equal scores are taken together
        if not len(good):
            found.append(1.0)
            continue
        last = int(good[-1])
        found.append((float(scores[last]) + float(below[last])) / 2)
    return found


@torch.no_grad()
def calibrate_exits(
    segmenter: StepSegmenter,
    batches: Callable[[], Batches],
    *,
    halted: float | None = None,
    points: float | None = None,
    ignore_index: int = 255,
) -> float:
    """Set one threshold for all exits of the segmenter, in place.

    Args:
        segmenter: on its device, in its dtype, with exits.
        batches: called once per threshold that is tried (up to 18): (images [B, C, H, W], normalised; labels integer [B, H, W] or None).
        halted: wanted share of supertokens that halt at any exit, from 0 to 1: the threshold at which about so many do.
        points: mIoU points (0 to 100) that may be lost against the same segmenter where nothing halts: the lowest threshold that loses
            no more. Without labels: percent of the pixels whose label may change. Both are taken to fall with the threshold.
        ignore_index: label of pixels that do not count.

    Returns:
        The threshold.

    Raises:
        ValueError: no exits, both or neither of ``halted`` and ``points``, one out of range, no pictures.
    """
    heads = segmenter.encoder.exit_heads()
    if not heads:
        raise ValueError("segmenter: expected one with exits, got none")
    if (halted is None) == (points is None):
        raise ValueError("halted: expected one of halted and points, got both or neither")

    def at(threshold: float, reference: list[Tensor] | None = None) -> Tried:
        for head in heads.values():
            head.threshold = threshold  # type: ignore[assignment]  # fills the buffer
        return tried(segmenter, batches(), reference, ignore_index)

    if halted is not None:
        wanted = check_number("halted", halted, minimum=0, maximum=1)

        def excess(threshold: float) -> float:
            return at(threshold).halted - wanted
    else:
        lost = check_number("points", points, minimum=0, maximum=100)
        full = at(1.0)

        def excess(threshold: float) -> float:
            return full.score - at(threshold, full.labels).score - lost

    # In logits, as confidences crowd near 1; `low` does too much, `high` does not. Of flat pictures most tokens are about equally sure.
    low, high = -7.0, LIMIT
    near, halvings = (0.0, HALVINGS) if halted is None else (min(NEAR, wanted / 20), 2 * HALVINGS)
    for _ in range(halvings):
        middle = (low + high) / 2
        over = excess(sigmoid(middle))
        low, high = (low, middle) if over <= 0 else (middle, high)
        if halted is not None and -near <= over <= 0:
            break
    threshold = sigmoid(high) if high < LIMIT else 1.0  # nothing tried was fine
    for head in heads.values():
        head.threshold = threshold  # type: ignore[assignment]
    return threshold


def sigmoid(logit: float) -> float:
    return float(torch.tensor(logit, device="cpu").sigmoid())


class Tried(NamedTuple):
    halted: float  # share of supertokens
    score: float  # mIoU in percent, or without labels the percentage of pixels whose labels are the reference's
    labels: list[Tensor]  # predicted, by batch


def tried(segmenter: StepSegmenter, batches: Batches, reference: list[Tensor] | None, ignore_index: int) -> Tried:
    """The segmenter as it is. ``reference``: predicted labels to compare with where none are given; None: its own."""
    confusion, found = Confusion(segmenter.num_classes, ignore_index), list[Tensor]()
    stopped = tokens = equal = unlabelled = 0
    for number, (images, labels) in enumerate(batches):
        predictions = predict_windows(segmenter, images, runs=(runs := Runs()))
        tokens += sum(trace.layout.num_tokens - shape[0] * segmenter.encoder.vit.num_prefix for shape, trace in runs)
        stopped += sum(int(stage.halted.sum()) for _, trace in runs for stage in trace.stages)
        found.append(predictions.cpu())
        if labels is None:
            before = found[number] if reference is None else reference[number]
            equal, unlabelled = equal + int((found[number] == before).sum()), unlabelled + before.numel()
        else:
            confusion.add(predictions, labels)
    if not found:
        raise ValueError("batches: expected at least one picture, got none")
    score = 100 * equal / unlabelled if unlabelled else 100 * float(confusion.iou().nanmean())
    return Tried(stopped / tokens, score, found)
