"""The canvas: the map of class scores that exits write and the decoder completes."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import SupertokenLayout, scatter_back, scatter_into
from ...numerics import accumulator

__all__ = ["LOG_PROBABILITIES", "MASK_LOGITS", "complete_canvas", "log_probabilities", "new_canvas"]

LOG_PROBABILITIES, MASK_LOGITS = "log-probabilities", "mask logits"  # what a canvas may hold


def new_canvas(tokens: Tensor, layout: SupertokenLayout, num_classes: int) -> Tensor:
    """Zeros [B, num_classes, rows, cols] of the tokens' dtype; channels_last, as each token writes all its classes at once."""
    return tokens.new_zeros(layout.batch_size, *layout.grid, num_classes).permute(0, 3, 1, 2)


def log_probabilities(scores: Tensor) -> Tensor:
    """Log-softmax over classes, computed in fp32 or wider, in the scores' dtype."""
    return scores.log_softmax(1, dtype=accumulator(scores.dtype)).to(scores.dtype)


def complete_canvas(canvas: Tensor | None, values: Tensor, layout: SupertokenLayout) -> Tensor:
    """``values`` [capacity, C] of the last stage in the cells of ``layout``, and in the others what the exits wrote.

    Written into ``canvas`` in place where gradients are disabled. None: there are no exits.
    """
    if canvas is None:
        return scatter_back(values, layout)
    if torch.is_grad_enabled():
        return canvas + scatter_back(values, layout)
    return scatter_into(canvas, values, layout)
