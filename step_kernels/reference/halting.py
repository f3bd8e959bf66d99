"""Reference of an exit stage: confidence, decision, compaction, canvas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import accumulator
from .cells import expand_blocks_, live_count, with_tail
from .norm import layer_norm

Decision = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def halt_tokens(
    scores: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    threshold: float,
    threshold_tensor: Tensor | None,
    softmax: bool,
    keep_per_class: int,
    forced: Tensor | None,
    values: Tensor,
    canvas: Tensor | None,
) -> Decision:
    """-> new cu_seqlens, new cells, rows, halted, confidence, labels; writes the canvas."""
    is_block = (torch.arange(cells.shape[0], device=cells.device) < live_count(cu_seqlens, 0)) & (cells[:, 3] > 0)
    confidence, labels = _confidence(scores, is_block, softmax)
    limit = torch.tensor(threshold) if threshold_tensor is None else threshold_tensor
    confident = is_block & (confidence > limit.float())
    if forced is not None:
        halted = forced & is_block
    elif keep_per_class:
        halted = confident & ~_most_confident(confidence, labels, cells[:, 0], confident, keep_per_class)
    else:
        halted = confident
    if canvas is not None:
        features = canvas.permute(0, 2, 3, 1)
        expand_blocks_(features, values, cu_seqlens, cells, where=halted | confident)
    return *_survivors(cu_seqlens, cells, halted), halted.clone(), confidence, labels


def exit_head(
    tokens: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    cu_seqlens: Tensor,
    cells: Tensor,
    threshold: float,
    threshold_tensor: Tensor | None,
    keep_per_class: int,
    forced: Tensor | None,
    canvas: Tensor | None,
) -> Decision:
    live = live_count(cu_seqlens, 0)
    normed = layer_norm(tokens[:live], norm_weight, norm_bias, eps)
    logits = F.linear(normed, weight, bias)
    # The tail holds nothing: its rows are never read, so they need no scores.
    log_probabilities = logits.new_zeros(cells.shape[0], weight.shape[0], dtype=accumulator(logits.dtype))
    log_probabilities[:live] = F.log_softmax(logits, 1, dtype=log_probabilities.dtype)
    return halt_tokens(
        log_probabilities,
        cu_seqlens,
        cells,
        threshold,
        threshold_tensor,
        True,
        keep_per_class,
        forced,
        log_probabilities,
        canvas,
    )


def gather_tokens(tokens: Tensor, rows: Tensor, cu_seqlens: Tensor | None, fill_tail: bool) -> Tensor:
    live = live_count(cu_seqlens, rows.shape[0])
    return with_tail(tokens.index_select(0, rows[:live]), rows.shape[0])


def gather_tokens_backward(grad: Tensor, rows: Tensor, cu_seqlens: Tensor | None, capacity: int) -> Tensor:
    live = live_count(cu_seqlens, rows.shape[0])
    return grad.new_zeros(capacity, grad.shape[1]).index_copy_(0, rows[:live].long(), grad[:live])


def _confidence(scores: Tensor, is_block: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """fp32 [capacity] (0 for prefix and tail, NaN kept) and int32 [capacity] (-1 for prefix, tail and NaN)."""
    scores = scores.to(accumulator(scores.dtype))
    best, labels = scores.max(1)
    if softmax:
        best = 1 / (scores - best[:, None]).exp().sum(1)  # the largest entry of the softmax
    confidence = torch.where(is_block, best.float(), 0)
    return confidence, torch.where(is_block & ~confidence.isnan(), labels, -1).to(torch.int32)


def _most_confident(confidence: Tensor, labels: Tensor, image: Tensor, candidates: Tensor, count: int) -> Tensor:
    """bool [capacity]: the ``count`` most confident candidates of each image and class; ties go to the lower row."""
    rows = candidates.nonzero().flatten()
    rows = rows[confidence[rows].argsort(descending=True, stable=True)]
    group = image[rows].long() * (int(labels.max()) + 1 if labels.numel() else 1) + labels[rows]
    order = group.argsort(stable=True)
    rows, group = rows[order], group[order]
    rank = torch.arange(rows.shape[0], device=rows.device) - torch.searchsorted(group, group)
    kept = torch.zeros_like(candidates)
    kept[rows[rank < count]] = True
    return kept


def _survivors(cu_seqlens: Tensor, cells: Tensor, halted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed layout of the live tokens that did not halt, and the input row of each; zeros in the tail."""
    live = live_count(cu_seqlens, 0)
    survives = ~halted[:live]
    before = F.pad(survives.cumsum(0), (1, 0))  # survivors in rows < i
    kept = survives.nonzero().flatten()
    rows = torch.zeros(cells.shape[0], dtype=torch.int32, device=cells.device)
    rows[: kept.shape[0]] = kept
    new_cells = torch.zeros_like(cells)
    new_cells[: kept.shape[0]] = cells[kept]
    return before[cu_seqlens.long()].to(torch.int32), new_cells, rows
