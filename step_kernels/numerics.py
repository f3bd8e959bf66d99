"""What all floors and the model layer agree on about numbers: the dtype of sums, and where bilinear interpolation reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Axis = tuple[Tensor, Tensor]  # of each output along one axis the sources and their weights, [K, outputs] each


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Taps:
    """The outputs of one axis in groups: those between the same two sources."""

    first: Tensor  # int64 [groups]: the lower source
    second: Tensor  # int64 [groups]: the upper source
    weight: Tensor  # [groups, longest]: of the upper source, for each output; a short group repeats its first one
    place: Tensor  # int64 [outputs]: of each output, in all groups one after the other


def taps(size: int, upsampled: int, device: torch.device, dtype: torch.dtype) -> Taps:
    """Sources and weights of ``F.interpolate(mode="bilinear", align_corners=False)`` along one axis, at exact positions.

    An output that lies exactly at a source takes that source twice, at half weights: zero times infinity would be NaN.
    """
    position = (2 * torch.arange(upsampled, device=device) + 1) * size - upsampled  # in units of 1 / (2 * upsampled)
    lower = position.div(2 * upsampled, rounding_mode="floor")
    beyond = position - lower * (2 * upsampled)
    exact = beyond == 0
    key, group, count = torch.unique_consecutive(2 * lower + ~exact, return_inverse=True, return_counts=True)
    source, between = key.div(2, rounding_mode="floor"), key % 2
    start, step = count.cumsum(0) - count, torch.arange(int(count.max()), device=device)
    output = start[:, None] + torch.where(step < count[:, None], step, 0)
    weight = torch.where(exact, 0.5, beyond.to(dtype) / (2 * upsampled))
    place = group * len(step) + torch.arange(upsampled, device=device) - start[group]
    return Taps(source.clamp(min=0), (source + between).clamp(max=size - 1), weight[output], place)


def axis_of(cells: int, pixels: int, crop: int, starts: list[int], size: int, wanted: int, *, like: Tensor) -> Axis:
    """Along one axis, what each of ``wanted`` pixels is made of: cells, counted through all crops, and their weights.

    A crop's ``cells`` are upsampled to ``pixels``, of which the first ``crop`` are its own; crops that overlap are averaged; the image
    of ``size`` is then resized.
    """
    exact: Any = {"dtype": torch.float64, "device": "cpu"}

    def bilinear(cells: int, pixels: int) -> Tensor:
        return F.interpolate(torch.eye(cells, **exact)[None], pixels, mode="linear", align_corners=False)[0].t()

    share = torch.zeros(size, len(starts) * cells, **exact)
    for number, start in enumerate(starts):
        share[start : start + crop, number * cells : (number + 1) * cells] = bilinear(cells, pixels)[:crop]
    share /= share.sum(1, keepdim=True)
    share = share if wanted == size else bilinear(size, wanted) @ share
    share *= share > 1e-9  # rounding of positions that lie exactly at a cell
    weight, index = share.topk(int((share > 0).sum(1).max()))
    return index.t().to(like.device), weight.t().to(like.device, accumulator(like.dtype))


def stretch(scores: Tensor, axis: Axis, dim: int, pixels: slice) -> Tensor:
    """Some pixels of a dimension, in fp32 or wider; cells of weight 0 take no part, whatever they hold."""
    limit = 1e30  # finite: a class of log-probability -inf wins nothing where it has weight
    scores = scores.to(axis[1].dtype).nan_to_num(limit, limit, -limit)
    shape = [-1 if i == dim else 1 for i in range(3)]
    terms = (
        scores.index_select(dim, index[pixels]).mul_(weight[pixels].view(shape))
        for index, weight in zip(*axis, strict=True)
    )
    return functools.reduce(Tensor.add_, terms)
