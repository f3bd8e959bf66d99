"""evaluate: what fewer tokens cost and save, on labelled pictures, beside controls of the same size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..encoder import StepEncoder
from ..flops import count_flops
from ..heads.exits import ExitHead
from ..images import patch_grid
from ..policies.base import VariancePolicy
from ..policies.oracle import OraclePolicy
from ..segmenter import StepSegmenter
from ..windows import Runs, crops_of, predict_windows
from .augment import Prepared, batches
from .controls import RandomExit, RandomPolicy
from .metrics import Confusion

__all__ = ["VARIANTS", "evaluate", "variant"]

VARIANTS = (
    "dense", "merged", "merged + exits", "random merging", "random halting", "variance", "oracle",
)  # fmt: skip
COUNTED = 4  # batches whose FLOPs are counted, at most


def evaluate(
    segmenter: StepSegmenter,
    data: Any,
    variants: Sequence[str] = ("dense", "merged", "merged + exits"),
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None = None,
    ignore_index: int = 255,
    batch: int = 1,
    border: int = 3,
    seed: int = 0,
    views: Mapping[str, Any] | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
) -> dict[str, dict[str, Any]]:
    """Accuracy, tokens, GFLOPs and speed of a trained model and of what it is compared with.

    Args:
        segmenter: on its device, in its dtype. Its own policy and exits are ``merged`` and ``merged + exits``.
        data: map-style; items are (uint8 [3, H, W], integer [H, W]), all of one size where ``batch`` > 1.
        variants: ``dense``: neither policy nor exits; ``merged``: without exits; ``merged + exits``, without a policy the exits alone; controls of the same size:
            ``random merging`` (as many blocks of each side in each image as the policy takes, anywhere; no exits) and ``random halting``
            (the policy's blocks; as many tokens as each exit halts, random ones); ``variance`` (`VariancePolicy`, calibrated on these pictures
            to as many tokens as the policy leaves; no exits) and ``oracle`` (blocks of one class by the labels; no exits).
        mean, std: per channel, of pictures in [0, 1].
        classes: their names, for the per-class figures.
        ignore_index: label of pixels that do not count.
        batch: pictures at a time.
        border: pixels up to which a pixel is near a border.
        seed: of the controls.
        views: arguments of `predict_windows`; what they leave out is as ``segmenter.info`` tells.
        progress: wraps the batches of a variant, such as ``tqdm``.

    Returns:
        By variant: ``miou``, ``pixel_accuracy``, ``border_miou``, ``thin_miou`` and ``thin_classes`` (regions less wide than a patch), ``iou``
        by class, ``agreement`` (pixels with the dense model's label, where ``dense`` is among the variants), all in percent;
        ``tokens`` per picture without prefix tokens, ``reduction``, ``halted`` (percent of supertokens by exit and in all), ``gflops`` per picture
        (of batches at even distances; policy, heads and decoder included), ``images_per_second`` (this process, `StepSegmenter.predict`, no reading).

    Raises:
        ValueError: an unknown variant; one that needs a policy or exits where there are none; no data.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not len(data):
        raise ValueError(f"variants: expected some of {', '.join(VARIANTS)} and pictures, got {unknown or 'no data'}")
    prepared, views = Prepared(data, mean, std), dict(views or {})
    parameter = next(segmenter.parameters())
    dense: list[Tensor] = []
    found, tokens = {}, 0.0
    for name in sorted(variants, key=VARIANTS.index):
        named: dict[str, Any] = {"prepared": prepared, "tokens": tokens, "ignore_index": ignore_index, "views": views}
        make = variant(segmenter, name, seed=seed, **named)
        confusion = Confusion(segmenter.num_classes, ignore_index, border)
        tally = Tally(segmenter, views)
        for number, (images, labels) in enumerate(progress(batches(prepared, batch), name)):
            images, labels = images.to(parameter.device, parameter.dtype), labels.to(parameter.device)
            model = make(labels)
            predictions = tally.run(model, images, counted=number % -(-len(data) // (batch * COUNTED)) == 0)
            confusion.add(predictions, labels)
            if name == "dense":
                dense.append(predictions.to(torch.uint8 if segmenter.num_classes <= 256 else torch.int32).cpu())
            elif dense:
                tally.agreeing += int((predictions.cpu() == dense[number]).sum())
        found[name] = confusion.summary(segmenter.encoder.vit.patch_size, classes)
        found[name] |= tally.summary(name != "dense" and bool(dense))
        if name == "merged":
            tokens = found[name]["reduction"]
    return found


def variant(
    segmenter: StepSegmenter,
    name: str,
    *,
    seed: int,
    prepared: Prepared,
    tokens: float,
    ignore_index: int,
    views: Mapping[str, Any],
) -> Callable[[Tensor], StepSegmenter]:
    """The model of a variant for a batch of labels; it shares all parameters with ``segmenter``."""
    encoder = segmenter.encoder
    cut: list[Any] = [views.get(name) for name in ("window", "stride", "resize")]
    exits: dict[int, ExitHead] = encoder.exit_heads()
    policy: Any = encoder.policy
    if name in ("merged", "random merging") and policy is None:
        raise ValueError(f"segmenter: expected one with a policy for the variant {name!r}, got none")
    if name in ("merged + exits", "random halting") and not exits:
        raise ValueError(f"segmenter: expected one with exits for the variant {name!r}, got none")
    if name == "random halting":
        exits = {number: RandomExit(head, seed + number) for number, head in encoder.exit_heads().items()}
    elif name != "merged + exits":
        exits = {}
    if name == "dense":
        policy = None
    elif name == "random merging":
        policy = RandomPolicy(policy, seed)
    elif name == "variance":
        if not tokens:
            raise ValueError("variants: expected 'merged' beside 'variance', whose number of tokens it takes")
        images = (crop for i in range(len(prepared)) for crop in crops_of(segmenter, prepared[i][0][None], *cut)[2])
        policy = VariancePolicy.calibrate(images, reduction=tokens, patch_size=encoder.vit.patch_size)
    elif name == "oracle" and (views.get("mirror") or tuple(views.get("scales", (1.0,))) != (1.0,)):
        raise ValueError(
            "variants: expected 'oracle' without scales and mirror, as it knows labels of one view, got both"
        )

    def model(labels: Tensor) -> StepSegmenter:
        decides = policy
        if name == "oracle":
            decides = OraclePolicy(crops_of(segmenter, labels[:, None], *cut)[2][:, 0], ignore_index=ignore_index)
        made = StepEncoder(encoder.vit, decides, exits, resample=encoder.resample)
        segments = StepSegmenter(made.to(labels.device), segmenter.decoder).eval()
        segments.info = segmenter.info
        return segments

    return model


class Tally:
    """Tokens, halts, FLOPs, seconds and agreement, summed over batches."""

    def __init__(self, segmenter: StepSegmenter, views: Mapping[str, Any]) -> None:
        self.vit, self.views = segmenter.encoder.vit, views
        self.images = self.cells = self.tokens = self.pixels = self.agreeing = 0
        self.halted: dict[int, int] = {}
        self.flops, self.counted, self.seconds = 0, 0, 0.0

    def run(self, model: StepSegmenter, images: Tensor, counted: bool) -> Tensor:
        """Labels of the batch; ``counted``: its FLOPs, too."""
        if self.images == 0:
            predict_windows(model, images, **self.views)  # first calls compile and allocate
        start, runs = now(images), Runs()
        predictions = predict_windows(model, images, **self.views, runs=runs)
        self.seconds += now(images) - start
        self.images, self.pixels = self.images + len(images), self.pixels + predictions.numel()
        for shape, trace in runs:
            rows, cols = patch_grid(shape[2], shape[3], self.vit.patch_size)
            self.cells += shape[0] * rows * cols
            self.tokens += trace.layout.num_tokens - shape[0] * self.vit.num_prefix
            for stage in trace.stages:
                self.halted[stage.block] = self.halted.get(stage.block, 0) + int(stage.halted.sum())
            if counted:
                dense = model.encoder.policy is None and not trace.stages
                self.flops += count_flops(model, shape, None if dense else trace).total
        self.counted += len(images) * counted
        return predictions

    def summary(self, compared: bool) -> dict[str, Any]:
        halted = {str(block): round(100 * count / self.tokens, 2) for block, count in self.halted.items()}
        told = {
            "tokens": round(self.tokens / self.images, 1),
            "reduction": round(self.cells / self.tokens, 4),
            "halted": halted | {"all": round(100 * sum(self.halted.values()) / self.tokens, 2)},
            "gflops": float(f"{self.flops / self.counted / 1e9:.4g}"),
            "images_per_second": round(self.images / self.seconds, 2),
        }
        return told | ({"agreement": round(100 * self.agreeing / self.pixels, 2)} if compared else {})


def now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()
