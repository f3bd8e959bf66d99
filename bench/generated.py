"""Pictures made of numbers, for machines without photographs: calm ground, flat shapes, rough shapes; no two alike."""

from __future__ import annotations

import numpy as np

SHAPES = 14
SMALLEST, LARGEST = 0.05, 0.28  # half-axes of a shape, share of the picture's side
ROUGH_SHARE = 0.5
NOISE = 70.0


def draw_pictures(size: int, count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    generator = np.random.default_rng(seed)
    return np.stack([_draw(generator, size) for _ in range(count)])


def _draw(generator: np.random.Generator, size: int) -> np.ndarray:
    """A slow change of colour from top to bottom, with ellipses on it: some of one colour, some full of noise."""
    down, across = np.mgrid[0:size, 0:size] / size
    top, bottom = generator.uniform(30, 225, (2, 3))
    pixels = top + (bottom - top) * down[..., None]
    for _ in range(SHAPES):
        centre, axes = generator.uniform(0, 1, 2), generator.uniform(SMALLEST, LARGEST, 2)
        inside = ((down - centre[0]) / axes[0]) ** 2 + ((across - centre[1]) / axes[1]) ** 2 < 1
        rough = generator.uniform() < ROUGH_SHARE
        noise = generator.uniform(-NOISE, NOISE, (int(inside.sum()), 3)) if rough else 0.0
        pixels[inside] = generator.uniform(20, 235, 3) + noise
    return pixels.clip(0, 255).astype(np.uint8)
