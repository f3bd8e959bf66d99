"""How good labels are: intersection over union and what it hides, counted pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_int, check_tensor
from ...layout import INTEGERS

__all__ = ["Confusion", "border_pixels"]


def border_pixels(labels: Tensor, distance: int) -> Tensor:
    """Pixels that have another label within ``distance`` pixels (a square's radius): bool, of the shape of ``labels`` [B, H, W].

    The trimap of Krähenbühl and Koltun (arXiv 1210.5644), where segmentation differs most.
    """
    size = 2 * check_int("distance", distance, minimum=1) + 1
    wide = labels[:, None].float()
    pooled = [F.max_pool2d(sign * wide, size, 1, distance) for sign in (1, -1)]  # padded with -inf
    return (pooled[0] != wide)[:, 0] | (pooled[1] != -wide)[:, 0]


@dataclass
class Confusion:
    """Counts of (label, prediction) pairs over all pixels with a label, and over those near borders.

    Attributes:
        num_classes: number of classes.
        ignore_index: label of pixels that do not count.
        border: distance in pixels up to which a pixel is near a border between labels.
        counts, near_border: int64 [label, prediction].
        outline: per class, pixels with this label that touch another one: what tells thin classes.
    """

    num_classes: int
    ignore_index: int = 255
    border: int = 3
    counts: Tensor = field(init=False)
    near_border: Tensor = field(init=False)
    outline: Tensor = field(init=False)

    def __post_init__(self) -> None:
        classes = check_int("num_classes", self.num_classes, minimum=1)
        self.counts, self.near_border = (
            torch.zeros(classes, classes, dtype=torch.int64, device="cpu") for _ in range(2)
        )
        self.outline = torch.zeros(classes, dtype=torch.int64, device="cpu")

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Integer [B, H, W] each, on any device."""
        check_tensor("labels", labels, ("B", "H", "W"), dtypes=INTEGERS)
        check_tensor("predictions", predictions, tuple(labels.shape), dtypes=INTEGERS)
        labels, predictions = labels.long(), predictions.long()
        seen = labels != self.ignore_index
        self.counts += self._pairs(predictions[seen], labels[seen])
        near = seen & border_pixels(labels, self.border)
        self.near_border += self._pairs(predictions[near], labels[near])
        touching = labels[seen & border_pixels(labels, 1)]
        self.outline += torch.bincount(touching.cpu(), minlength=self.num_classes)

    def _pairs(self, predictions: Tensor, labels: Tensor) -> Tensor:
        flat = torch.bincount(labels * self.num_classes + predictions, minlength=self.num_classes**2)
        if len(flat) > self.num_classes**2:
            raise ValueError(f"labels: expected some below {self.num_classes}, or {self.ignore_index}, got others")
        return flat.view(self.num_classes, self.num_classes).cpu()

    def iou(self) -> Tensor:
        """Per class; NaN for classes that neither labels nor predictions have."""
        return iou_of(self.counts)

    def thickness(self) -> Tensor:
        """Twice the area over the outline, in pixels per class: about how wide its regions are."""
        return 2 * self.counts.sum(1).double() / self.outline

    def summary(self, thin: float, classes: Sequence[str] | None = None) -> dict[str, Any]:
        """Percentages. ``thin``: classes whose regions are less wide than so many pixels are thin."""
        iou, thickness = self.iou(), self.thickness()
        slim = thickness < thin
        names = [str(number) for number in range(self.num_classes)] if classes is None else classes
        return {
            "miou": percent(iou.nanmean()),
            "pixel_accuracy": percent(self.counts.trace() / self.counts.sum()),
            "border_miou": percent(iou_of(self.near_border).nanmean()),
            "thin_miou": percent(iou[slim].nanmean()),
            "thin_classes": [name for name, is_slim in zip(names, slim.tolist(), strict=True) if is_slim],
            "iou": {name: percent(value) for name, value in zip(names, iou, strict=True)},
        }


def iou_of(counts: Tensor) -> Tensor:
    """Intersection over union per class, over the whole set, as mmsegmentation's IoUMetric."""
    both = counts.diagonal().double()
    return both / (counts.sum(0) + counts.sum(1) - counts.diagonal())


def percent(value: Tensor) -> float | None:
    """With two decimals; None for NaN, which JSON does not have."""
    number = round(100 * float(value), 2)
    return None if number != number else number
