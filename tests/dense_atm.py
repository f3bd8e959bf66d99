"""A segmenter with ATM exits on padded dense tensors, in plain PyTorch: halted tokens stay where they are, masked as keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels.model import StepSegmenter, Trace


class Stage(NamedTuple):
    """What one head saw and says of padded tokens [B, N]."""

    present: Tensor  # bool [B, N]
    cells: Tensor  # [B, N, 3]: row, column, side
    masks: Tensor  # [B, N, C], mask logits
    weights: Tensor  # [B, C]

    @property
    def predictions(self) -> Tensor:
        return self.weights[:, None] * self.masks.sigmoid()


def dense_segment(segmenter: StepSegmenter, images: Tensor, trace: Trace) -> tuple[Tensor, list[Stage]]:
    """The predictions [B, C, rows, cols] of images of whole patches at these decisions, and each stage: exits, then decoder."""
    vit, exits = segmenter.encoder.vit, segmenter.encoder.exits
    present, cells = padded_cells(trace)
    x = embedded(vit, images, present, cells, trace.layout.grid)
    left, stages = present.clone(), []
    masks = torch.zeros(len(images), *trace.layout.grid, segmenter.num_classes, dtype=images.dtype)
    for number, block in enumerate(vit.blocks, start=1):
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attention(q @ k.mT / math.sqrt(q.shape[-1]), v, left)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        if str(number) in exits:
            stages.append(atm(exits[str(number)].head, x, left, cells))
            halted = torch.zeros_like(left)
            halted[left] = trace.stages[len(stages) - 1].halted  # packed order is the order in the padded rows
            masks = painted(masks, stages[-1], halted)
            left = left & ~halted
    stages.append(atm(segmenter.decoder.head, vit.norm(x), left, cells))
    masks = painted(masks, stages[-1], left)
    return (stages[-1].weights[:, None, None] * masks.sigmoid()).permute(0, 3, 1, 2), stages


def padded_cells(trace: Trace) -> tuple[Tensor, Tensor]:
    lengths = trace.layout.cu_seqlens.diff().tolist()
    images = trace.layout.cells.split(lengths)
    present = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return present, nn.utils.rnn.pad_sequence([image[:, 1:] for image in images], batch_first=True)


def embedded(vit: nn.Module, images: Tensor, present: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every supertoken by itself: its pixels and its positions averaged."""
    positions = vit.grid_positions(grid).T.unflatten(1, grid)
    patch, found = vit.patch_size, []
    for image, of_image, exists in zip(images, cells.tolist(), present.tolist(), strict=True):
        rows = []
        for (row, column, side), real in zip(of_image, exists, strict=True):
            if real and side:
                window = (slice(row, row + side), slice(column, column + side))
                pixels = image[:, *(slice(patch * x.start, patch * x.stop) for x in window)]
                token = vit.patch_embed.proj(F.avg_pool2d(pixels[None], side)).flatten()
                rows.append(token + positions[:, *window].mean((1, 2)))
            else:
                rows.append(vit.prefix_tokens()[0])
        found.append(torch.stack(rows))
    return torch.stack(found)


def attention(scores: Tensor, values: Tensor, keys: Tensor) -> Tensor:
    """Scores [B, H, L, N] over the keys that exist, bool [B, N], applied to values [B, H, N, D] -> [B, L, H * D]."""
    weights = scores.masked_fill(~keys[:, None, None], -math.inf).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2)


def atm(head: nn.Module, x: Tensor, left: Tensor, cells: Tensor) -> Stage:
    """The head as the papers' code runs it, self-attention by PyTorch's own module."""
    memory = head.proj_norm(head.input_proj(x))
    queries = head.q.weight.expand(len(x), -1, -1)
    for layer in head.decoder["layers"]:
        queries = layer.norm1(queries + layer.self_attn(queries, queries, queries)[0])
        cross = layer.multihead_attn
        q, k, v = (
            linear(source).unflatten(2, (cross.num_heads, -1)).transpose(1, 2)
            for linear, source in ((cross.q, queries), (cross.k, memory), (cross.v, memory))
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        queries = layer.norm2(queries + cross.proj(attention(scores, v, left)))
        queries = layer.norm3(queries + layer.linear2(F.relu(layer.linear1(queries))))
    return Stage(left.clone(), cells, scores.mean(1).mT, head.class_embed(queries).softmax(-1)[..., 0])


def painted(masks: Tensor, stage: Stage, where: Tensor) -> Tensor:
    """``masks`` [B, rows, cols, C] with the stage's mask logits in the cells of some tokens; a new tensor."""
    masks = masks.clone()
    for image, token in where.nonzero().tolist():
        row, column, side = stage.cells[image, token].tolist()
        masks[image, row : row + side, column : column + side] = stage.masks[image, token]
    return masks


def expected_halting(stage: Stage, threshold: float, keep: int) -> Tensor:
    """Who of the stage's tokens halts, in packed order: above the threshold, but the ``keep`` best of each image and class."""
    confidence, labels = stage.predictions.max(2)
    halts = (confidence > threshold) & stage.present & (stage.cells[..., 2] > 0)
    for image in range(len(halts)):
        for label in range(stage.weights.shape[1]):
            rivals = (halts[image] & (labels[image] == label)).nonzero().flatten().tolist()
            for token in sorted(rivals, key=lambda i: -float(confidence[image, i]))[:keep]:
                halts[image, token] = False
    return halts[stage.present]
