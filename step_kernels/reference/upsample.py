"""Reference of the output tail: bilinear upsampling and argmax, without the classes that cannot win.

Between two neighbouring source rows and columns (a *quad*) the difference of two classes is bilinear, too: what is larger at all four
corners is larger at every output. So a class that one other exceeds at all corners wins nowhere in that quad, and its scores there are
never computed: of 150 classes some ten remain even on the scores of an untrained network. Quads with similar numbers of candidates are
computed together, as small matmuls of corners and bilinear weights: few large steps, as on busy cores every parallel step waits for the
slower core.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics import accumulator, taps

SCORES_AT_A_TIME = 1 << 20  # bounds every intermediate, whatever the sizes: four times as many corners and weights


def upsample_argmax(canvas: Tensor, height: int, width: int) -> Tensor:
    batch_size, classes, rows, cols = canvas.shape
    dtype = torch.uint8 if classes <= 256 else torch.int32
    sums = accumulator(canvas.dtype)
    vertical, horizontal = taps(rows, height, canvas.device, sums), taps(cols, width, canvas.device, sums)
    (quads_y, down), (quads_x, right) = vertical.weight.shape, horizontal.weight.shape
    labels = torch.empty(batch_size, quads_y, down, quads_x, right, dtype=dtype, device=canvas.device)
    per_row = quads_x * max(batch_size * classes, down * right)
    step = max(1, SCORES_AT_A_TIME // per_row)
    images = canvas.permute(0, 2, 3, 1).contiguous()  # of which each corner is gathered
    for start in range(0, quads_y, step):
        band = slice(start, start + step)
        corners = quad_corners(
            images, (vertical.first[band], vertical.second[band]), (horizontal.first, horizontal.second)
        )
        weights = bilinear_weights(vertical.weight[band], horizontal.weight)
        best = label_quads(corners.flatten(1, 3).to(sums), weights, dtype)
        labels[:, band] = best.view(*corners.shape[1:4], down, right).transpose(2, 3)
    return labels.flatten(1, 2).flatten(2).index_select(1, vertical.place).index_select(2, horizontal.place)


def quad_corners(images: Tensor, rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor]) -> Tensor:
    """[B, rows, cols, C] -> [4, B, quads_y, quads_x, C]: top left, top right, bottom left, bottom right."""
    batch_size, height, width, classes = images.shape
    image = torch.arange(batch_size, device=images.device)[:, None, None]
    y, x = torch.stack(rows)[:, None, None, :, None], torch.stack(cols)[:, None, None, :]
    cell = (image * height + y) * width + x  # [2, 2, B, quads_y, quads_x]
    return images.view(-1, classes).index_select(0, cell.flatten()).view(4, *cell.shape[2:], classes)


def bilinear_weights(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """[quads_y, down] and [quads_x, right] -> [quads_y * quads_x, 4, down * right], corners as in ``quad_corners``."""
    y, x = vertical[:, None, :, None], horizontal[None, :, None, :]
    return torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], 2).flatten(0, 1).flatten(2)


def label_quads(corners: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """corners [4, B * quads, C], weights [quads, 4, outputs] -> each output's best class, the lowest of equals: [B * quads, outputs]."""
    possible = possible_winners(corners)
    count, classes = possible.sum(1), possible.nonzero()[:, 1]
    start = count.cumsum(0) - count
    labels = classes[start, None].to(dtype).repeat(1, weights.shape[2])  # where there is one candidate, it wins
    corner = torch.arange(4, device=corners.device)
    for quads, most in _similar_quads(count, corners.shape[2], weights.shape[2]):
        number = torch.arange(most, device=corners.device).minimum(count[quads, None] - 1)  # the last one repeatedly
        rivals = classes[start[quads, None] + number][:, :, None]  # [quads, most, 1]
        scores = corners[corner, quads[:, None, None], rivals] @ weights.index_select(0, quads % len(weights))
        labels[quads] = lowest_best(scores, rivals, corners.shape[2]).to(dtype)
    return labels


def lowest_best(scores: Tensor, classes: Tensor, count: int) -> Tensor:
    """The lowest class of the largest score: scores [quads, n, outputs] (overwritten), classes < count [quads, n, 1] -> [quads, outputs].

    Four vectorised steps take a fraction of the time of ``max(1).indices``: the bits of a negative float are an integer below -2^23, those of zero
    are zero, so that the largest sum of bits and class, counted from the last, is of a best score.
    """
    behind = scores.sub_(scores.amax(1, keepdim=True)).nan_to_num_(0.0)  # no score is NaN: inf - inf
    bits = behind.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    return count - 1 - bits.add_((count - 1 - classes).to(bits.dtype)).amax(1)


def possible_winners(corners: Tensor) -> Tensor:
    """[4, quads, C] -> bool [quads, C]: not the classes that are below a strong rival at all corners.

    The rival is strong at its worst corner and in the quad's middle. Where the middle is NaN, so are all scores of the class in the quad, as
    no weight is zero: the first such class is the rival, and it alone is possible.
    """
    middle = (corners.new_full((4,), 0.25) @ corners.flatten(1)).view(corners.shape[1:])
    strength, rival = (corners.amin(0) + middle).max(1)  # on a CPU faster than argmax
    lead = (corners - corners.gather(2, rival[None, :, None].expand(4, -1, 1))).amax(0)
    possible = ~((lead < 0) | strength.isnan()[:, None])  # a NaN in one class's lead leaves it in the race
    return possible.scatter_(1, rival[:, None], True)


def _similar_quads(candidates: Tensor, classes: int, outputs: int) -> Iterator[tuple[Tensor, int]]:
    """Indices of quads with at most size candidates and more than the size before, and that size, for size in `group_sizes`."""
    candidates, quads = candidates.sort()
    sizes = group_sizes(classes)
    ends = torch.searchsorted(candidates, torch.tensor(sizes, device=candidates.device), right=True).tolist()
    for size, (start, end) in zip(sizes[1:], itertools.pairwise(ends), strict=True):
        if start < end:
            for some in quads[start:end].split(max(1, SCORES_AT_A_TIME // (size * outputs))):
                yield some, size


def group_sizes(classes: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..., classes: from 16 on, halfway points spare a good tenth of the scores."""
    sizes = [1]
    while sizes[-1] < classes:
        last = sizes[-1]
        is_power = last & (last - 1) == 0
        sizes.append(min(classes, 2 * last if last < 16 else last * 3 // 2 if is_power else last * 4 // 3))
    return sizes
