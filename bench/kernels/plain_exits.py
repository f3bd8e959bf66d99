"""The PyTorch contenders of an exit stage: confidence, compaction, canvas and gather; with or without its linear head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import covered_cells

EPS = 1e-6
Stage = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def halt_tokens(
    scores: Tensor, tokens: Tensor, canvas: Tensor, cu_seqlens: Tensor, cells: Tensor, threshold: float
) -> Stage:
    """softmax, max, nonzero, index_select -> cu_seqlens, cells, rows, halted, confidence, labels, canvas, survivors."""
    confidence, labels = scores.softmax(1, dtype=torch.float32).max(1)
    return compacted(confidence, labels, scores, tokens, canvas, cu_seqlens, cells, threshold)


def exit_head(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    canvas: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    threshold: float,
) -> Stage:
    """The same behind LayerNorm and a linear layer; the canvas receives log-probabilities."""
    normed = F.layer_norm(tokens, tokens.shape[1:], norm_weight, norm_bias, EPS)
    log_probabilities = F.linear(normed, weight, bias).log_softmax(1, dtype=torch.float32)
    best, labels = log_probabilities.max(1)
    return compacted(best.exp(), labels, log_probabilities, tokens, canvas, cu_seqlens, cells, threshold)


def compacted(
    confidence: Tensor,
    labels: Tensor,
    values: Tensor,
    tokens: Tensor,
    canvas: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    threshold: float,
) -> Stage:
    """What follows the confidences: who halts, the survivors' layout and rows, and the canvas."""
    is_block = cells[:, 3] > 0
    confidence = torch.where(is_block, confidence, 0)
    labels = torch.where(is_block, labels, -1).to(torch.int32)
    halted = confidence > threshold
    left = ~halted
    rows = left.nonzero().flatten()
    before = F.pad(left.cumsum(0, dtype=torch.int32), (1, 0))
    gone = halted.nonzero().flatten()
    cell, position = covered_cells(cells[gone], (canvas.shape[2], canvas.shape[3]))
    canvas.permute(0, 2, 3, 1).view(-1, canvas.shape[1])[cell] = values[gone[position]].to(canvas.dtype)
    survivors = tokens.index_select(0, rows)
    return before[cu_seqlens], cells[rows], rows.to(torch.int32), halted, confidence, labels, canvas, survivors
