"""What is minimised in training: of the policy, of the exits, of the whole, and without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import SupertokenLayout, scatter_back
from ...checks import check_int, check_number, check_sides, check_tensor
from ...layout import INTEGERS
from ..images import patch_grid
from ..policies.base import SIDES, fitting_sides
from ..policies.oracle import PURE, UNLABELLED, by_patches

__all__ = ["consistency_loss", "exit_loss", "merging_cost", "merging_loss", "policy_loss", "segmentation_loss"]


def policy_loss(logits: Sequence[Tensor], purity: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of the policy's logits against `block_purity`, averaged over labelled blocks, then over sides.

    Sides where no block is labelled do not count. Differentiable in ``logits``, as `PolicyNet.logits` returns them:
    [B, rows // side, cols // side] per side, floating point; computed in fp32 or wider. Scalar; zero where nothing is labelled.

    Raises:
        ValueError: another number of maps, or maps of other shapes.
    """
    return over_blocks(
        logits,
        purity,
        lambda scores, target: F.binary_cross_entropy_with_logits(scores, (target == PURE).float(), reduction="none"),
    )


def merging_loss(logits: Sequence[Tensor], costs: Sequence[Tensor], *, tolerance: float) -> Tensor:
    """What the policy's decisions cost, averaged over labelled blocks, then over sides.

    ``softplus(-x) + cost / tolerance * softplus(x)``: smooth bounds of 1 for a block that is not merged and of ``cost / tolerance`` for one
    that is. Where it is least, the score ``sigmoid(x)`` is ``tolerance / (tolerance + expected cost)``: blocks are ranked by what merging
    them is expected to cost, and it is worth its tokens above 1/2.

    Args:
        logits: as of `policy_loss`.
        costs: `merging_cost` of the same blocks.
        tolerance: the cost, such as 0.05, at which merging and not merging are equally good.

    Returns:
        A scalar, differentiable in ``logits``; zero where nothing is labelled.

    Raises:
        ValueError: another number of maps, or maps of other shapes, a tolerance that is not positive.
    """
    if check_number("tolerance", tolerance) <= 0:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance}")
    return over_blocks(logits, costs, lambda scores, cost: F.softplus(-scores) + cost / tolerance * F.softplus(scores))


def over_blocks(
    logits: Sequence[Tensor], targets: Sequence[Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The mean over sides of each side's mean over labelled blocks, whose target is not `UNLABELLED`."""
    if len(logits) != len(targets):
        raise ValueError(f"logits: expected {len(targets)} maps, one for each side, got {len(logits)}")
    total = logits[0].new_zeros((), dtype=torch.float32) if logits else torch.zeros(())
    counted = torch.zeros_like(total)
    for i, (scores, target) in enumerate(zip(logits, targets, strict=True)):
        check_tensor(f"logits[{i}]", scores, tuple(target.shape))
        labelled = target != UNLABELLED
        count = labelled.sum()
        total = total + (loss(scores.float(), target) * labelled).sum() / count.clamp(min=1)
        counted = counted + (count > 0)
    return total / counted.clamp(min=1)


def merging_cost(
    labels: Tensor, class_weights: Tensor, sides: Sequence[int] = SIDES, *, patch_size: int, ignore_index: int = 255
) -> list[Tensor]:
    """What merging each block of patches costs: the share of its labelled pixels that are not of its commonest class, by weight.

    Where `block_purity` calls a block mixed for one pixel, this tells a corner of the pavement from a pedestrian.

    Args:
        labels: integer [B, H, W], of images before padding; below C, or ``ignore_index``.
        class_weights: [C]: what a wrong pixel of each class counts.
        sides, patch_size, ignore_index: as of `block_purity`.

    Returns:
        fp32 [B, rows // side, cols // side] for each side that fits the grid, ascending; -1 where no pixel is labelled.

    Raises:
        TypeError, ValueError: as `block_purity`; a label out of range.
    """
    check_tensor("labels", labels, ("B", "H", "W"), dtypes=INTEGERS)
    sides = check_sides("sides", sides)
    rows, cols = grid = patch_grid(labels.shape[1], labels.shape[2], check_int("patch_size", patch_size, minimum=1))
    batch, classes = labels.shape[0], class_weights.shape[0]
    counted = torch.where(labels.long() == ignore_index, classes, labels.long())
    wrong = labels[(counted < 0) | (counted > classes) | ((counted == classes) & (labels != ignore_index))]
    if wrong.numel():  # it would count in another block; bincount waits for the host, too
        raise ValueError(f"labels: expected some below {classes}, or {ignore_index}, got {int(wrong[0])}")
    pixels = by_patches(counted, grid, patch_size, classes)  # [B, rows, p, cols, p]
    patches = torch.arange(batch * rows * cols, device=labels.device).view(batch, rows, 1, cols, 1)
    bins = (patches * (classes + 1) + pixels).flatten()
    counts = torch.bincount(bins, minlength=batch * rows * cols * (classes + 1)).view(batch, rows, cols, -1)
    counts, side, maps = counts[..., :classes].float(), 1, list[Tensor]()
    for wanted in fitting_sides(sides, grid):
        while side < wanted:
            side, counts = 2 * side, F.avg_pool2d(counts.permute(0, 3, 1, 2), 2, divisor_override=1).permute(0, 2, 3, 1)
        others = counts.scatter(-1, counts.argmax(-1, keepdim=True), 0.0) @ class_weights.to(counts)
        total = counts.sum(-1)
        maps.append(torch.where(total > 0, others / total.clamp(min=1), UNLABELLED))
    return maps


def segmentation_loss(
    scores: Tensor, labels: Tensor, *, patch_size: int, ignore_index: int = 255, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of class scores on the patch grid, upsampled bilinearly as `StepSegmenter.predict` does, with labels of pixels.

    Args:
        scores: [B, C, rows, cols] of the padded images: logits or log-probabilities, which have the same cross-entropy.
        labels: integer [B, H, W], before padding.
        patch_size: pixels per side of a patch.
        ignore_index: the label of pixels that do not count.
        reduction: ``"mean"`` over the pixels that count (zero where there are none), or ``"sum"``.

    Returns:
        A scalar in fp32 or wider, differentiable in ``scores``.

    Raises:
        TypeError, ValueError: tensors of a wrong type, dtype or shape.
    """
    check_tensor("labels", labels, (scores.shape[0], "H", "W"), dtypes=INTEGERS)
    grid = patch_grid(labels.shape[1], labels.shape[2], patch_size)
    if scores.shape[2:] != grid:
        raise ValueError(f"scores: expected the grid {grid[0]} x {grid[1]} of the labels, got {list(scores.shape)}")
    size = grid[0] * patch_size, grid[1] * patch_size
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    pixels = F.interpolate(wide, size=size, mode="bilinear")[:, :, : labels.shape[1], : labels.shape[2]]
    total = F.cross_entropy(pixels, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total if reduction == "sum" else total / (labels.long() != ignore_index).sum().clamp(min=1)


def exit_loss(
    scores: Tensor,
    layout: SupertokenLayout,
    labels: Tensor,
    *,
    patch_size: int,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """`segmentation_loss` of an exit on all tokens that reach it: DToP's auxiliary heads (arXiv 2308.01045).

    Args:
        scores: class logits [capacity, C] of the tokens of ``layout``, as `ExitHead.scores` returns them.
        layout: their layout. Cells that it does not cover, as their tokens have halted, do not count.
        labels, patch_size, ignore_index, reduction: as in `segmentation_loss`.

    Returns:
        A scalar, differentiable in ``scores``. Errors: as of `segmentation_loss`.
    """
    canvas = scatter_back(scores, layout)
    covered = scatter_back(torch.ones_like(scores[:, :1]), layout).detach() > 0
    spread = covered.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    spread = spread[:, 0, : labels.shape[1], : labels.shape[2]]
    seen = torch.where(spread, labels.long(), ignore_index)
    return segmentation_loss(canvas, seen, patch_size=patch_size, ignore_index=ignore_index, reduction=reduction)


def consistency_loss(merged: Tensor, dense: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL divergence of the dense model's class distribution from the merged one's, averaged over cells: needs no labels.

    ``T^2 * KL(softmax(dense / T) || softmax(merged / T))``, Hinton et al., "Distilling the Knowledge in a Neural Network"
    (arXiv 1503.02531).

    Args:
        merged: class scores [B, C, rows, cols], differentiable.
        dense: those of the same images where nothing is merged; no gradient flows into them.
        temperature: T, positive.

    Returns:
        A scalar in fp32 or wider.

    Raises:
        TypeError, ValueError: tensors that differ in shape, a temperature that is not positive.
    """
    if check_number("temperature", temperature) <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    check_tensor("dense", dense, tuple(merged.shape))
    own, target = ((scores.float() / temperature).log_softmax(1) for scores in (merged, dense.detach()))
    each = F.kl_div(own, target, reduction="none", log_target=True).sum(1)
    return each.mean() * temperature**2
