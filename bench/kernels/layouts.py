"""Spread layouts: as uneven as a policy's. The mean image keeps 1 / 2.5 of its tokens, and images differ (CV 0.3).

An image is a smooth random map of how busy each cell is. A block may merge while its busiest cell is calmer than the
image's own limit, and bisection finds the limit that leaves the number of tokens drawn for the image. The scores are that
limit minus the busiest cell, so `resolve_layout` at threshold 0 makes the layout: what a policy network would hand over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels import SupertokenLayout, resolve_layout, use_backend

SIDES = (2, 4, 8, 16)
THRESHOLD = 0.0
REDUCTION = 2.5
VARIATION = 0.3  # standard deviation of the images' tokens over their mean
FEWEST, MOST = 0.02, 1.0  # share of an image's cells that may remain as tokens, where the draw would leave that range
ROUGHNESS = 0.55  # amplitude of each octave of the busy map relative to the next coarser one: all sides occur
BISECTIONS = 30


@dataclass(frozen=True)
class Drawn:
    """One batch: a policy's scores, one per side of `sides`, and the trimmed layout that they resolve to."""

    scores: tuple[Tensor, ...]
    sides: tuple[int, ...]
    layout: SupertokenLayout


def draw_layouts(
    count: int,
    batch: int,
    grid: tuple[int, int],
    *,
    num_prefix: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    variation: float = VARIATION,
) -> list[Drawn]:
    """`count` batches of layouts on `device`, each with the mean above and that variation (a batch of one: all together)."""
    generator = torch.Generator().manual_seed(seed)
    sides = tuple(side for side in SIDES if side <= min(grid))
    wanted = _token_counts(count, batch, variation, generator) * grid[0] * grid[1]
    busy = _busy_maps(count * batch, grid, generator)
    busiest = [F.max_pool2d(busy, side)[:, 0] for side in sides]
    low, high = busy.amin((1, 2, 3)) - 1, busy.amax((1, 2, 3)) + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = _resolve(_scores(busiest, middle, dtype), sides, grid, 0).lengths() > wanted
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    scores = _scores(busiest, high, dtype)
    drawn = []
    for number in range(count):
        own = tuple(score[number * batch : (number + 1) * batch].contiguous() for score in scores)
        layout = _resolve(own, sides, grid, num_prefix).trim().to(device)
        drawn.append(Drawn(tuple(score.to(device) for score in own), sides, layout))
    return drawn


def _token_counts(count: int, batch: int, variation: float, generator: torch.Generator) -> Tensor:
    """[count * batch], share of each image's cells that remain: exactly the wanted mean and variation in each batch."""
    normal = torch.randn(count, batch, generator=generator, dtype=torch.float64)
    if batch == 1:
        normal = normal.T
    deviation = normal.std(1, keepdim=True, correction=0)
    normal = (normal - normal.mean(1, keepdim=True)) / deviation.clamp(min=torch.finfo(torch.float64).tiny)
    if batch == 1:
        normal = normal.T
    return ((1 + variation * normal) / REDUCTION).clamp(FEWEST, MOST).flatten()


def _busy_maps(images: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[images, 1, rows, cols]: noise of every wavelength, the longer the stronger."""
    busy, size, amplitude = torch.zeros(images, 1, *grid), 2, 1.0
    while size <= max(grid):
        noise = torch.randn(images, 1, size, size, generator=generator)
        busy += amplitude * F.interpolate(noise, grid, mode="bilinear", align_corners=False)
        size, amplitude = 2 * size, amplitude * ROUGHNESS
    return busy


def _scores(busiest: Sequence[Tensor], limit: Tensor, dtype: torch.dtype) -> list[Tensor]:
    # Rounding to a narrow dtype keeps a difference's sign, so it changes no decision at threshold 0.
    return [(limit[:, None, None] - block).to(dtype) for block in busiest]


def _resolve(
    scores: Sequence[Tensor], sides: tuple[int, ...], grid: tuple[int, int], num_prefix: int
) -> SupertokenLayout:
    with use_backend("reference"):
        return resolve_layout(list(scores), sides=sides, thresholds=THRESHOLD, grid=grid, num_prefix=num_prefix)
