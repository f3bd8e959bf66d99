"""Reference of the output tail: bilinear upsampling and argmax, without the classes that cannot win.

Between two neighbouring source rows and columns (a *quad*) every upsampled score lies between the smallest and the largest of its four
corners. So a class whose largest corner is below another class's smallest wins nowhere in that quad, and its scores there are never
computed: of 150 classes a tenth remain even on the scores of an untrained network. Quads with similar numbers of candidates are computed
together, as small matmuls of bilinear weights and corners: few large steps, as on busy cores every parallel step waits for the slower core.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics import Taps, accumulator, taps

SCORES_AT_A_TIME = 1 << 20  # bounds every intermediate, whatever the sizes


def upsample_argmax(canvas: Tensor, height: int, width: int) -> Tensor:
    batch_size, classes, rows, cols = canvas.shape
    dtype = torch.uint8 if classes <= 256 else torch.int32
    labels = torch.empty(batch_size, height, width, dtype=dtype, device=canvas.device)
    sums = accumulator(canvas.dtype)
    vertical, horizontal = taps(rows, height, canvas.device, sums), taps(cols, width, canvas.device, sums)
    quads, longest = horizontal.output.shape  # of one row of quads, outputs of one quad
    per_row = batch_size * quads * max(4 * classes, 4 * longest * vertical.output.shape[1])
    step = max(1, SCORES_AT_A_TIME // max(1, per_row))
    images = canvas.permute(0, 2, 3, 1)  # [B, rows, cols, C]
    for start in range(0, vertical.first.shape[0], step):
        band = vertical.rows(start, start + step)
        corners = quad_corners(images, band, horizontal).to(sums)
        weights = bilinear_weights(band.weight, horizontal.weight).expand(batch_size, -1, -1, -1, -1, -1)
        write_quads(labels, label_quads(corners.flatten(0, 2), weights.flatten(0, 2).flatten(1, 2)), band, horizontal)
    return labels


def bilinear_weights(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """[groups_y, longest_y] and [groups_x, longest_x] -> [groups_y, groups_x, longest_y, longest_x, 4], corners as in ``quad_corners``."""
    y, x = vertical[:, None, :, None], horizontal[None, :, None, :]
    return torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)


def quad_corners(images: Tensor, vertical: Taps, horizontal: Taps) -> Tensor:
    """[B, rows, cols, C] -> [B, groups_y, groups_x, 4, C]: top left, top right, bottom left, bottom right."""
    pairs = [(y, x) for y in (vertical.first, vertical.second) for x in (horizontal.first, horizontal.second)]
    return torch.stack([images[:, y[:, None], x] for y, x in pairs], 3)


def label_quads(corners: Tensor, weights: Tensor) -> Tensor:
    """The best class of each output of each quad, the lowest of equals: corners [quads, 4, C], weights [quads, outputs, 4] -> int64."""
    possible = ~(corners.amax(1) < corners.amin(1).amax(1, keepdim=True))  # a NaN leaves every class in the race
    first = possible.to(torch.uint8).argmax(1)  # the winner where there is no other candidate
    labels = first[:, None].repeat(1, weights.shape[1])
    for quads, candidates in _similar_quads(possible.sum(1), corners.shape[2], weights.shape[1]):
        # Candidates first, in ascending order: max gives the first of equals.
        classes = possible[quads].sort(dim=1, descending=True, stable=True).indices[:, :candidates]
        scores = weights[quads] @ corners[quads].gather(2, classes[:, None].expand(-1, 4, -1))
        labels[quads] = classes.gather(1, scores.max(2).indices)  # on a CPU faster than argmax
    return labels


def _similar_quads(candidates: Tensor, classes: int, outputs: int) -> Iterator[tuple[Tensor, int]]:
    """Indices of quads with at most size candidates and more than the size before, and that size, for size in `group_sizes`."""
    for fewer, size in itertools.pairwise(group_sizes(classes)):
        quads = ((candidates > fewer) & (candidates <= size)).nonzero().flatten()
        for some in quads.split(max(1, SCORES_AT_A_TIME // (size * outputs))):
            if some.numel():
                yield some, size


def group_sizes(classes: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..., classes: from 16 on, halfway points spare a good tenth of the scores."""
    sizes = [1]
    while sizes[-1] < classes:
        last = sizes[-1]
        is_power = last & (last - 1) == 0
        sizes.append(min(classes, 2 * last if last < 16 else last * 3 // 2 if is_power else last * 4 // 3))
    return sizes


def write_quads(out: Tensor, labels: Tensor, vertical: Taps, horizontal: Taps) -> None:
    """labels [B * groups_y * groups_x, longest_y * longest_x] -> their places in out [B, height, width]."""
    shape = vertical.first.shape[0], horizontal.first.shape[0], vertical.output.shape[1], horizontal.output.shape[1]
    places = vertical.output[:, None, :, None], horizontal.output[None, :, None, :]
    out[:, *places] = labels.view(out.shape[0], *shape).to(out.dtype)
