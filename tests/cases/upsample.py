"""Scores of upsampled canvases, and what labels taken from them are held to."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 8 * torch.finfo(torch.float32).eps  # two products and a sum per direction


def exact_scores(canvas: Tensor, size: tuple[int, int]) -> Tensor:
    """fp64 [B, C, height, width]: bilinear at exact source positions; a source of weight zero takes no part, even infinite or NaN."""
    return _along(_along(canvas.double(), 3, size[1]), 2, size[0])


def _along(scores: Tensor, dim: int, outputs: int) -> Tensor:
    sources = scores.shape[dim]
    position = (2 * torch.arange(outputs, device=scores.device) + 1) * sources + outputs
    second = position // (2 * outputs)
    weight = (position - second * 2 * outputs).double() / (2 * outputs)
    weight = weight.view([-1 if i == dim else 1 for i in range(4)])
    low = scores.index_select(dim, (second - 1).clamp(min=0))
    high = scores.index_select(dim, second.clamp(max=sources - 1))
    return torch.where(weight == 0, low, (1 - weight) * low + weight * high)


def check_labels(labels: Tensor, scores: Tensor, *, decided: float = 0.9) -> None:
    """The best class of each pixel (the first NaN, the first of infinite ones), or one whose score is within rounding of the best."""
    batch, classes, *size = scores.shape
    assert labels.shape == (batch, *size) and labels.is_contiguous()
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int32)
    if labels.numel() == 0:
        return
    finite = scores.where(scores.isfinite(), 0)
    tolerance = ROUNDING * finite.abs().amax()
    expected = scores.argmax(1, keepdim=True)
    best, chosen = scores.gather(1, expected), scores.gather(1, labels.long()[:, None])
    tied = best.isfinite() & (best - chosen <= tolerance)
    assert ((labels[:, None] == expected) | tied).all()
    if classes > 1:
        lead = finite.topk(2, dim=1).values.diff(dim=1).abs()
        assert (lead > tolerance).float().mean() > decided, "too few pixels are decided: this test shows little"
