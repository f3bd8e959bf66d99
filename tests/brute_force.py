"""What every operation means, as small explicit loops over images, blocks, tokens and classes.

Written from the specification alone, in plain PyTorch on fp64 tensors (so that autograd gives true gradients), and slow
on purpose. Functions return live rows only: what rows past the live count hold is the tests' business.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from layouts import Block, PlainLayout
from torch import Tensor

# Layouts


def sides(layout: PlainLayout) -> Tensor:
    """int32 [B, rows, cols]: side of the block that covers each cell, 0 where there is none."""
    result = torch.zeros(len(layout.images), *layout.grid, dtype=torch.int32)
    for token in layout.tokens():
        for row in range(token.row, token.row + token.side):
            for column in range(token.column, token.column + token.side):
                result[token.image, row, column] = token.side
    return result


def resolve(scores: list[Tensor], side_list: list[int], thresholds: list[float], grid: tuple[int, int]) -> PlainLayout:
    """Coarse to fine: a block is taken when its score beats the threshold and no coarser one lies there."""
    rows, columns = grid
    images = []
    for image in range(scores[0].shape[0]):
        covered = [[False] * columns for _ in range(rows)]
        blocks: list[Block] = []
        levels = sorted(zip(side_list, scores, thresholds, strict=True), key=lambda level: -level[0])
        for side, score, threshold in levels:
            limit = torch.tensor(threshold, dtype=torch.float32)
            for i in range(rows // side):
                for j in range(columns // side):
                    if covered[i * side][j * side] or not score[image, i, j].float() > limit:
                        continue
                    blocks.append((i * side, j * side, side))
                    for row in range(i * side, (i + 1) * side):
                        for column in range(j * side, (j + 1) * side):
                            covered[row][column] = True
        blocks += [(i, j, 1) for i in range(rows) for j in range(columns) if not covered[i][j]]
        images.append(tuple(sorted(blocks)))
    return PlainLayout(tuple(images), grid)


def replace_prefix(tokens: Tensor, layout: PlainLayout, new_prefix: Tensor) -> Tensor:
    """Every image's prefix rows swapped for the rows of ``new_prefix``, [P, D] or [B, P, D]."""
    rows = []
    start = layout.cu_seqlens()
    for image in range(len(layout.images)):
        rows += list(new_prefix if new_prefix.dim() == 2 else new_prefix[image])
        rows += [tokens[row] for row in range(start[image] + layout.num_prefix, start[image + 1])]
    return torch.stack(rows) if rows else tokens[:0]


# Merging and scattering


def shrink(block: Tensor, side: int, resample: str) -> Tensor:
    """[C, p * side, p * side] -> [C, p, p], one output pixel at a time."""
    channels, size = block.shape[0], block.shape[1] // side
    pixels = []
    for i in range(size):
        for j in range(size):
            window = block[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            if resample == "bilinear" and side > 1:
                half = side // 2
                window = window[:, half - 1 : half + 1, half - 1 : half + 1]
            pixels.append(window.mean(dim=(1, 2)))
    return torch.stack(pixels, dim=1).reshape(channels, size, size)


def normalise(images: Tensor, mean: list[float] | None, std: list[float] | None) -> Tensor:
    """fp64 pixels; bytes are first divided by 255."""
    pixels = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    count = pixels.shape[1]
    offsets, scales = mean or [0.0] * count, std or [1.0] * count
    return torch.stack([(pixels[:, c] - offsets[c]) / scales[c] for c in range(count)], dim=1)


def merge_patches(
    images: Tensor,
    layout: PlainLayout,
    patch_size: int,
    resample: str = "area",
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Tensor:
    """[live, C * p * p]; prefix rows are zero."""
    pixels = normalise(images, mean, std)
    width = pixels.shape[1] * patch_size * patch_size
    rows = [torch.zeros(0, width, dtype=torch.float64)]
    for token in layout.tokens():
        if token.side == 0:
            rows.append(torch.zeros(1, width, dtype=torch.float64))
            continue
        top, left, size = token.row * patch_size, token.column * patch_size, token.side * patch_size
        block = pixels[token.image, :, top : top + size, left : left + size]
        rows.append(shrink(block, token.side, resample).reshape(1, width))
    return torch.cat(rows)


def embed_patches(
    images: Tensor,
    layout: PlainLayout,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    resample: str = "area",
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Tensor:
    """[live, D]: the shrunken block through the convolution's weight, plus its shrunken position."""
    dim, patch_size = weight.shape[0], weight.shape[-1]
    patches = merge_patches(images, layout, patch_size, resample, mean, std)
    rows = [torch.zeros(0, dim, dtype=torch.float64)]
    seen_prefix = 0
    for token, patch in zip(layout.tokens(), patches, strict=True):
        if token.side == 0:
            index = seen_prefix % layout.num_prefix
            seen_prefix += 1
            rows.append(torch.zeros(1, dim, dtype=torch.float64) if prefix is None else prefix[index].double()[None])
            continue
        row = torch.stack([(weight[d].double().flatten() * patch).sum() for d in range(dim)])
        if bias is not None:
            row = row + bias.double()
        if pos_embed is not None:
            map_ = pos_embed.double().T.reshape(dim, *layout.grid)
            area = map_[:, token.row : token.row + token.side, token.column : token.column + token.side]
            row = row + shrink(area, token.side, resample).flatten()
        rows.append(row[None])
    return torch.cat(rows)


def merge_tokens(tokens: Tensor, layout: PlainLayout, prefix: Tensor | None = None) -> Tensor:
    """[live, D]: the mean of each block's cells."""
    columns, dim = layout.grid[1], tokens.shape[-1]
    rows = [torch.zeros(0, dim, dtype=torch.float64)]
    seen_prefix = 0
    for token in layout.tokens():
        if token.side == 0:
            index = seen_prefix % layout.num_prefix
            seen_prefix += 1
            rows.append(torch.zeros(1, dim, dtype=torch.float64) if prefix is None else prefix[index].double()[None])
            continue
        total = torch.zeros(dim, dtype=torch.float64)
        for row in range(token.row, token.row + token.side):
            for column in range(token.column, token.column + token.side):
                total = total + tokens[token.image, row * columns + column].double()
        rows.append((total / token.side**2)[None])
    return torch.cat(rows)


def scatter_into(canvas: Tensor, values: Tensor, layout: PlainLayout, where: list[bool] | None = None) -> Tensor:
    """A new canvas [B, C, rows, cols] with the selected tokens' values in every cell they cover."""
    cells = {}
    for index, token in enumerate(layout.tokens()):
        if token.side == 0 or (where is not None and not where[index]):
            continue
        for row in range(token.row, token.row + token.side):
            for column in range(token.column, token.column + token.side):
                cells[token.image, row, column] = values[index]
    batch, channels, rows, columns = canvas.shape
    pixels = [
        cells.get((b, i, j), canvas[b, :, i, j]) for b in range(batch) for i in range(rows) for j in range(columns)
    ]
    if not pixels:
        return canvas
    return torch.stack(pixels).reshape(batch, rows, columns, channels).permute(0, 3, 1, 2)


# Attention, normalisation, matmul


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float | None = None, key_bias: Tensor | None = None
) -> Tensor:
    """[live, H, D]: one softmax per image, head and query."""
    heads, dim = q.shape[1:]
    factor = 1 / math.sqrt(dim) if scale is None else scale
    rows = [torch.zeros(0, heads, v.shape[2], dtype=torch.float64)]
    for start, end in itertools.pairwise(cu_seqlens):
        for query in range(start, end):
            per_head = []
            for head in range(heads):
                scores = (k[start:end, head].double() @ q[query, head].double()) * factor
                if key_bias is not None:
                    scores = scores + key_bias[start:end].double()
                weights = torch.exp(scores - scores.max().detach())
                per_head.append((weights / weights.sum()) @ v[start:end, head].double())
            rows.append(torch.stack(per_head)[None])
    return torch.cat(rows)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """[rows, D], each row by its own mean and biased variance."""
    rows = [torch.zeros(0, x.shape[1], dtype=torch.float64)]
    for row in x.double():
        centred = row - row.sum() / len(row)
        variance = (centred * centred).sum() / len(row)
        rows.append((centred / torch.sqrt(variance + eps) * weight.double() + bias.double())[None])
    return torch.cat(rows)


def activate(value: Tensor, activation: str | None) -> Tensor:
    """Both forms of GELU by their formulas."""
    if activation == "gelu":
        return value * 0.5 * (1 + torch.erf(value / math.sqrt(2)))
    if activation == "gelu_tanh":
        return value * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
    return value


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """[rows, N]: matmul, bias, activation, gamma, residual, in this order."""
    rows = [torch.zeros(0, weight.shape[0], dtype=torch.float64)]
    for index, row in enumerate(x.double()):
        value = torch.stack([(row * column.double()).sum() for column in weight])
        value = activate(value if bias is None else value + bias.double(), activation)
        value = value if gamma is None else value * gamma.double()
        rows.append((value if residual is None else value + residual[index].double())[None])
    return torch.cat(rows)


# Halting and upsampling


class Halted(NamedTuple):
    """One exit's decisions for every live row."""

    confidence: list[float]
    labels: list[int]
    halted: list[bool]
    written: list[bool]  # rows whose values go to the canvas
    survivors: list[int]
    layout: PlainLayout


def probabilities(row: Tensor, activation: str | None) -> Tensor:
    """A row of class probabilities in fp64."""
    if activation is None:
        return row.double()
    exponentials = torch.exp(row.double() - row.double().max())
    return exponentials / exponentials.sum()


def halt(
    scores: Tensor,
    layout: PlainLayout,
    threshold: float,
    activation: str | None = "softmax",
    keep_per_class: int = 0,
    mask: list[bool] | None = None,
) -> Halted:
    """Who halts, who stays as context, and who goes on."""
    tokens = layout.tokens()
    confidence, labels = [], []
    for index, token in enumerate(tokens):
        if token.side == 0:
            confidence.append(0.0)
            labels.append(-1)
        elif bool(scores[index].isnan().any()):
            confidence.append(math.nan)
            labels.append(-1)
        else:
            row = probabilities(scores[index], activation)
            best = max(range(len(row)), key=lambda c: float(row[c]))
            confidence.append(float(row[best].float()))
            labels.append(best)
    limit = float(torch.tensor(threshold, dtype=torch.float32))
    confident = [token.side > 0 and value > limit for token, value in zip(tokens, confidence, strict=True)]
    halted = list(confident)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, token in enumerate(tokens):
        if confident[index]:
            groups.setdefault((token.image, labels[index]), []).append(index)
    for members in groups.values():
        for index in sorted(members, key=lambda index: (-confidence[index], index))[:keep_per_class]:
            halted[index] = False
    if mask is not None:
        halted = [bool(wanted) and token.side > 0 for wanted, token in zip(mask, tokens, strict=True)]
    written = [a or b for a, b in zip(halted, confident, strict=True)]
    survivors = [index for index, gone in enumerate(halted) if not gone]
    return Halted(confidence, labels, halted, written, survivors, layout.without(halted))


def source_position(index: int, size_in: int, size_out: int) -> tuple[int, int, float]:
    """Two neighbours and the second one's weight, for align_corners=False."""
    position = max((index + 0.5) * size_in / size_out - 0.5, 0.0)
    low = min(math.floor(position), size_in - 1)
    return low, min(low + 1, size_in - 1), position - low


def upsample(canvas: Tensor, size: tuple[int, int]) -> Tensor:
    """fp64 [B, C, H, W], bilinear, one output pixel at a time."""
    batch, channels, rows, columns = canvas.shape
    image = canvas.double()
    result = torch.empty(batch, channels, *size, dtype=torch.float64)
    for y in range(size[0]):
        top, bottom, down = source_position(y, rows, size[0])
        for x in range(size[1]):
            left, right, across = source_position(x, columns, size[1])
            upper = image[:, :, top, left] * (1 - across) + image[:, :, top, right] * across
            lower = image[:, :, bottom, left] * (1 - across) + image[:, :, bottom, right] * across
            result[:, :, y, x] = upper * (1 - down) + lower * down
    return result
