"""Labelled pictures as the model takes them, with random scale, crop, flip and colour as mmsegmentation's recipes have them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ...checks import check_grid, check_number

__all__ = ["Prepared", "Recipe", "batches", "stacked"]

CROWDED = 0.75  # a crop of which one class takes more is drawn again, up to ten times (mmsegmentation's cat_max_ratio)
TRIES = 10


@dataclass(frozen=True)
class Recipe:
    """What is drawn at random.

    Attributes:
        crop: (height, width) of the result; smaller pictures are padded with the mean and ``ignore_index``. None: as they are.
        scale: the range of the size's factor; (1, 1) leaves it.
        flip: probability of a mirror image.
        colour: brightness, contrast, saturation and hue, each with probability 0.5.
    """

    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    colour: bool = True

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale: expected two positive factors, the smaller one first, got {self.scale}")
        check_number("flip", self.flip, minimum=0, maximum=1)
        if self.crop is not None:
            check_grid("crop", self.crop)


class Prepared(Dataset[tuple[Tensor, Tensor]]):
    """Items of ``data`` as (normalised fp32 [C, H, W], int64 [H, W]).

    Draws depend on (``seed``, ``epoch``, item) alone, not on workers, ranks or what was read before.

    Args:
        data: map-style; items are (uint8 [3, H, W], integer [H, W]).
        mean, std: per channel, of pictures in [0, 1].
        recipe: None: nothing is drawn.
        ignore_index: of pixels that padding adds.
    """

    def __init__(
        self,
        data: Any,
        mean: Sequence[float],
        std: Sequence[float],
        recipe: Recipe | None = None,
        *,
        seed: int = 0,
        ignore_index: int = 255,
    ) -> None:
        self.data, self.recipe, self.seed, self.epoch, self.ignore_index = data, recipe, seed, 0, ignore_index
        self.mean, self.std = (torch.tensor(values, device="cpu")[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        picture, labels = self.data[number]
        pixels, labels, recipe = picture.float() / 255, labels.long(), self.recipe
        if recipe is None:
            return (pixels - self.mean) / self.std, labels
        rng = np.random.default_rng((self.seed, self.epoch, number))
        pixels, labels = rescaled(pixels, labels, rng.uniform(*recipe.scale))
        if recipe.crop is not None:
            pixels, labels = cropped(pixels, labels, recipe.crop, self.ignore_index, rng)
        if rng.random() < recipe.flip:
            pixels, labels = pixels.flip(2), labels.flip(1)
        if recipe.colour:
            pixels = recoloured(pixels, rng)
        pixels = (pixels - self.mean) / self.std
        return padded(pixels, labels, recipe.crop or (0, 0), self.ignore_index)


def batches(data: Prepared, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All items in their order."""
    for first in range(0, len(data), size):
        yield stacked([data[i] for i in range(first, min(first + size, len(data)))])


def stacked(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch; ValueError where sizes differ."""
    sizes = sorted({tuple(labels.shape) for _, labels in items})
    if len(sizes) > 1:
        raise ValueError(
            f"batch: expected pictures of one size, or a crop, or batches of one, got {' and '.join(map(str, sizes[:3]))} "
            "(random scales make several of one)"
        )
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.stack(labels)


def rescaled(pixels: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    if factor == 1:
        return pixels, labels
    size = [max(1, round(side * factor)) for side in labels.shape]
    pixels = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=factor < 1)[0]
    return pixels, F.interpolate(labels[None, None].double(), size=size, mode="nearest-exact")[0, 0].long()


def cropped(
    pixels: Tensor, labels: Tensor, crop: tuple[int, int], ignore_index: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    for _ in range(TRIES):
        corner = [int(rng.integers(max(0, have - want) + 1)) for have, want in zip(labels.shape, crop, strict=True)]
        rows, cols = (slice(start, start + want) for start, want in zip(corner, crop, strict=True))
        inside = labels[rows, cols]
        counts = inside[inside != ignore_index].unique(return_counts=True)[1]
        if len(counts) > 1 and counts.max() <= CROWDED * counts.sum():
            break
    return pixels[:, rows, cols], inside


def padded(pixels: Tensor, labels: Tensor, size: tuple[int, int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Zeros, which are the mean, at the bottom and right."""
    below, beside = (max(0, want - have) for want, have in zip(size, labels.shape, strict=True))
    return F.pad(pixels, (0, beside, 0, below)), F.pad(labels, (0, beside, 0, below), value=ignore_index)


def recoloured(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """mmsegmentation's PhotoMetricDistortion, its hue turned about the grey axis (as in YIQ) instead of in HSV."""
    brightness, contrast, saturation, hue = (value if rng.random() < 0.5 else None for value in draws(rng))
    if brightness is not None:
        pixels = pixels + brightness
    if contrast is not None:
        pixels = pixels * contrast
    grey = pixels.mean(0, keepdim=True)
    if saturation is not None:
        pixels = grey + (pixels - grey) * saturation
    if hue is not None:
        # Rotation about (1, 1, 1): Rodrigues' formula.
        along, across = (1 - math.cos(hue)) / 3, math.sin(hue) / math.sqrt(3)
        one, two, three = math.cos(hue) + along, along - across, along + across
        turn = pixels.new_tensor([[one, two, three], [three, one, two], [two, three, one]])
        pixels = torch.einsum("ij,jhw->ihw", turn, pixels)
    return pixels.clamp(0, 1)


def draws(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Brightness of a range of 1, contrast, saturation, and hue in radians."""
    return rng.uniform(-32, 32) / 255, rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5), math.radians(rng.uniform(-18, 18))
