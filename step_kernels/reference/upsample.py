"""Reference of the output tail: bilinear upsampling and argmax, without the classes that cannot win.

Between two neighbouring source rows and columns (a *quad*) every upsampled score lies between the smallest and the largest of its four
corners. So a class whose largest corner is below another class's smallest wins nowhere in that quad, and its scores there are never
computed: of 150 classes a tenth remain even on the scores of an untrained network. Quads with similar numbers of candidates are computed
together, as small matmuls of bilinear weights and corners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import accumulator

SCORES_AT_A_TIME = 1 << 20  # bounds every intermediate, whatever the sizes
WASTE = 1.25  # quads share a matmul up to this ratio of candidates


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


def upsample_argmax(canvas: Tensor, height: int, width: int) -> Tensor:
    batch_size, classes, rows, cols = canvas.shape
    dtype = torch.uint8 if classes <= 256 else torch.int32
    labels = torch.empty(batch_size, height, width, dtype=dtype, device=canvas.device)
    sums = accumulator(canvas.dtype)
    vertical, horizontal = taps(rows, height, canvas.device, sums), taps(cols, width, canvas.device, sums)
    quads, longest = horizontal.output.shape  # of one row of quads, outputs of one quad
    per_row = quads * max(4 * classes, 4 * longest * vertical.output.shape[1])
    step = max(1, SCORES_AT_A_TIME // per_row)
    for start in range(0, vertical.first.shape[0], step):
        band = vertical.rows(start, start + step)
        weights = bilinear_weights(band.weight, horizontal.weight)
        for image, out in zip(canvas.permute(0, 2, 3, 1), labels, strict=True):  # [rows, cols, C]
            winners = label_quads(quad_corners(image, band, horizontal).to(sums), weights)
            write_quads(out, winners, band, horizontal)
    return labels


def taps(size: int, upsampled: int, device: torch.device, dtype: torch.dtype) -> Taps:
    """Sources and weights of ``F.interpolate(mode="bilinear", align_corners=False)`` along one axis."""
    position = (torch.arange(upsampled, device=device, dtype=dtype) + 0.5) * (size / upsampled) - 0.5
    lower = position.floor()
    source, count = torch.unique_consecutive(lower.long(), return_counts=True)
    step = torch.arange(int(count.max()), device=device)
    output = (count.cumsum(0) - count)[:, None] + torch.where(step < count[:, None], step, 0)
    return Taps(source.clamp(min=0), (source + 1).clamp(max=size - 1), output, (position - lower)[output])


def bilinear_weights(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """[groups_y, longest_y] and [groups_x, longest_x] -> [quads, outputs, 4], corners in the order of ``quad_corners``."""
    y, x = vertical[:, None, :, None], horizontal[None, :, None, :]
    corners = (1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x
    return torch.stack(corners, -1).flatten(2, 3).flatten(0, 1)


def quad_corners(image: Tensor, vertical: Taps, horizontal: Taps) -> Tensor:
    """image [rows, cols, C] -> [quads, 4, C]: top left, top right, bottom left, bottom right."""
    pairs = [(y, x) for y in (vertical.first, vertical.second) for x in (horizontal.first, horizontal.second)]
    return torch.stack([image[y[:, None], x] for y, x in pairs], 2).flatten(0, 1)


def label_quads(corners: Tensor, weights: Tensor) -> Tensor:
    """The best class of each output of each quad, the lowest of equals: int64 [quads, outputs]."""
    possible = ~(corners.amax(1) < corners.amin(1).amax(1, keepdim=True))  # a NaN leaves every class in the race
    labels = corners.new_empty(weights.shape[:2], dtype=torch.int64)
    for quads, candidates in _similar_quads(possible.sum(1), weights.shape[1]):
        # Candidates first, in ascending order: argmax gives the first of equals.
        classes = possible[quads].sort(dim=1, descending=True, stable=True).indices[:, :candidates]
        scores = weights[quads] @ corners[quads].gather(2, classes[:, None].expand(-1, 4, -1))
        labels[quads] = classes.gather(1, scores.argmax(2))
    return labels


def _similar_quads(candidates: Tensor, outputs: int) -> Iterator[tuple[Tensor, int]]:
    """Groups of quads whose numbers of candidates are alike: their indices, and the largest number among them."""
    ordered, order = candidates.sort()
    counts = ordered.tolist()
    start = 0
    while start < len(counts):
        stop = start + 1
        while stop < len(counts) and counts[stop] <= max(WASTE * counts[start], counts[start] + 2):
            if (stop + 1 - start) * counts[stop] * outputs > SCORES_AT_A_TIME:
                break
            stop += 1
        yield order[start:stop], counts[stop - 1]
        start = stop


def write_quads(out: Tensor, labels: Tensor, vertical: Taps, horizontal: Taps) -> None:
    """labels [quads, outputs] -> their places in out [height, width]."""
    shape = vertical.first.shape[0], horizontal.first.shape[0], vertical.output.shape[1], horizontal.output.shape[1]
    out[vertical.output[:, None, :, None], horizontal.output[None, :, None, :]] = labels.view(shape).to(out.dtype)
