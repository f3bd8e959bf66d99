"""Scenes: a generated segmentation set, so that training and evaluation have labelled pictures with no download."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...checks import check_grid, check_int

__all__ = ["Scenes"]

Map = np.ndarray[Any, Any]


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Landscapes of smooth regions, textures and thin structures: (picture uint8 [3, H, W], labels uint8 [H, W]).

    Sky over hills over a striped field, with houses, balls and poles; colours vary from scene to scene, and those of classes
    overlap, so that texture and shape must be seen. Scene ``i`` of a seed is always the same.

    Args:
        count: number of scenes.
        size: (height, width) in pixels, or one number for both; at least 16.
        seed: of the first scene; sets of other seeds have no scene in common.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    classes: ClassVar[tuple[str, ...]] = ("sky", "hill", "field", "house", "ball", "pole")
    ignore_index: ClassVar[int] = 255

    def __init__(self, count: int, size: int | tuple[int, int] = 128, seed: int = 0) -> None:
        self.count, self.seed = check_int("count", count, minimum=0), check_int("seed", seed, minimum=0)
        self.size = check_grid("size", (size, size) if isinstance(size, int) else size)
        if min(self.size) < 16:
            raise ValueError(f"size: expected at least 16 pixels, got {self.size}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if not -self.count <= number < self.count:
            raise IndexError(f"number: expected one of {self.count} scenes, got {number}")
        picture, labels = scene(self.size, np.random.default_rng((self.seed, number % self.count)))
        return torch.from_numpy(picture.transpose(2, 0, 1).copy()), torch.from_numpy(labels)


def scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[Map, Map]:
    """(uint8 [H, W, 3], uint8 [H, W])."""
    height, width = size
    unit = min(size) / 128  # what is a pixel in a scene of 128
    y, x = np.mgrid[:height, :width].astype(np.float32)
    labels, picture = np.zeros(size, np.uint8), np.empty((height, width, 3), np.float32)

    def paint(where: Map, label: int, colour: Map, shade: Map | float) -> None:
        labels[where] = label
        picture[where] = (colour + np.broadcast_to(shade, size)[..., None])[where]

    base = rng.uniform(0.25, 0.75, (len(Scenes.classes), 3)).astype(np.float32)
    base[0, 2] += 0.2  # the sky is bluer than it would be by chance
    base[2, 1] += 0.15
    paint(np.ones(size, bool), 0, base[0], 0.2 * (0.5 - y / height))
    hills = horizon(x, width, rng.uniform(0.3, 0.45) * height, 0.06 * height, rng)
    paint(y > hills, 1, base[1], 0.12 * blurred_noise(size, 6 * unit, rng))
    ground = horizon(x, width, rng.uniform(0.55, 0.7) * height, 0.03 * height, rng)
    angle = rng.uniform(-0.5, 0.5)
    stripes = 0.1 * np.sign(np.sin((y + angle * x) * 2 * np.pi / (8 * unit)))
    paint(y > ground, 2, base[2], stripes)
    for _ in range(rng.integers(1, 3)):
        tall, wide = rng.uniform(0.15, 0.35, 2) * min(size)
        foot, left = rng.uniform(0.5, 0.9) * height, rng.uniform(-0.1, 0.9) * width
        house = (y < foot) & (y > foot - tall) & (x > left) & (x < left + wide)
        windows = ((y // (4 * unit)) % 2 == 1) & ((x // (4 * unit)) % 2 == 1)
        paint(house, 3, jittered(base[3], rng), np.where(windows, -0.25, 0.05))
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(0.04, 0.12) * min(size)
        distance = np.hypot(y - rng.uniform(0.3, 1) * height, x - rng.uniform(0, 1) * width) / radius
        # A house's colours, without its windows.
        paint(distance < 1, 4, jittered(base[3], rng), 0.25 * (0.6 - distance))
    for _ in range(rng.integers(1, 3)):
        foot, top, at = rng.uniform(0.6, 1) * height, rng.uniform(0.1, 0.4) * height, rng.uniform(0, 1) * width
        lean = rng.uniform(-0.15, 0.15)
        paint((abs(x - at - lean * (foot - y)) < 1.5 * unit) & (y < foot) & (y > top), 5, jittered(base[5], rng), 0.0)
    light = rng.uniform(0.8, 1.2) * (1 + rng.uniform(-0.2, 0.2) * (x / width - 0.5))
    noisy = picture * light[..., None] + rng.normal(0, 0.03, picture.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8), labels


def horizon(x: Map, width: int, at: float, swing: float, rng: np.random.Generator) -> Map:
    """Height of a wavy line, for each x."""
    waves = [np.sin(2 * np.pi * (rng.uniform(0.5, 3) * x / width + rng.uniform())) for _ in range(3)]
    return at + swing * (waves[0] + waves[1] + waves[2])


def blurred_noise(size: tuple[int, int], grain: float, rng: np.random.Generator) -> Map:
    """Between -1 and 1, smooth over about ``grain`` pixels."""
    coarse = rng.uniform(-1, 1, [max(2, round(side / grain)) for side in size]).astype(np.float32)
    noise = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None, None], size=size, mode="bilinear")
    return noise[0, 0].numpy()


def jittered(colour: Map, rng: np.random.Generator) -> Map:
    return (colour + rng.uniform(-0.15, 0.15, 3)).astype(np.float32)
