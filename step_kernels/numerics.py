"""What all floors and the model layer agree on about numbers: the dtype of sums, and where bilinear interpolation reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Taps:
    """The outputs of one axis in groups: those between the same two sources."""

    first: Tensor  # int64 [groups]: the lower source
    second: Tensor  # int64 [groups]: the upper source
    output: Tensor  # int64 [groups, longest]: output indices; a short group repeats its first one
    weight: Tensor  # [groups, longest]: of the upper source

    def rows(self, start: int, stop: int) -> Taps:
        """Some of the groups."""
        return Taps(self.first[start:stop], self.second[start:stop], self.output[start:stop], self.weight[start:stop])


def taps(size: int, upsampled: int, device: torch.device, dtype: torch.dtype) -> Taps:
    """Sources and weights of ``F.interpolate(mode="bilinear", align_corners=False)`` along one axis, at exact positions.

    An output that lies exactly at a source takes that source twice, at half weights: zero times infinity would be NaN.
    """
    place = (2 * torch.arange(upsampled, device=device) + 1) * size - upsampled  # in units of 1 / (2 * upsampled)
    lower = place.div(2 * upsampled, rounding_mode="floor")
    beyond = place - lower * (2 * upsampled)
    exact = beyond == 0
    key, count = torch.unique_consecutive(2 * lower + ~exact, return_counts=True)
    source, between = key.div(2, rounding_mode="floor"), key % 2
    step = torch.arange(int(count.max()), device=device)
    output = (count.cumsum(0) - count)[:, None] + torch.where(step < count[:, None], step, 0)
    weight = torch.where(exact, 0.5, beyond.to(dtype) / (2 * upsampled))
    return Taps(source.clamp(min=0), (source + between).clamp(max=size - 1), output, weight[output])
