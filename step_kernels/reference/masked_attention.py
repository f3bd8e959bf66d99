"""Reference of attention among kept tokens: each image's kept rows through scaled_dot_product_attention; and its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics import accumulator
from .attention import attention_gradients, log_sum_exp, plain_attention


def kept_rows(keep: Tensor) -> tuple[Tensor, Tensor]:
    """rows int32 [B, L]: an image's kept rows, then the others, both ascending; counts int32 [B] of the kept ones."""
    rows = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
    return rows.int().contiguous(), keep.sum(1, dtype=torch.int32)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    counts: Tensor,
    all_keys: bool,
    scale: float | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, H, L, D]; lse [B, H, L], the log of the sum of exp of each kept query's scores, or an empty tensor."""
    out = _zeros_rows_first(q)
    lse = q.new_zeros(q.shape[:3] if save_lse else (0,), dtype=accumulator(q.dtype))
    for image, queries, keys in _selections(rows, counts, all_keys):
        operands = q[image][:, queries], k[image][:, keys], v[image][:, keys]  # [H, kept or L, D]
        out[image][:, queries] = plain_attention(*operands, scale)
        if save_lse:
            lse[image][:, queries] = log_sum_exp(*operands[:2], scale)
    return out, lse


def masked_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    counts: Tensor,
    all_keys: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _zeros_rows_first(q), _zeros_rows_first(q), _zeros_rows_first(q)
    for image, queries, keys in _selections(rows, counts, all_keys):
        chosen = queries, keys, keys
        operands = q[image][:, queries], k[image][:, keys], v[image][:, keys]
        found = attention_gradients(grad[image][:, queries], *operands, scale)
        for x, index, gradient in zip(grads, chosen, found, strict=True):
            x[image][:, index] = gradient.to(x.dtype)
    return grads


def _zeros_rows_first(like: Tensor) -> Tensor:
    """A zero [B, H, L, D] stored as [B, L, H, D]."""
    return like.new_zeros(like.transpose(1, 2).shape).transpose(1, 2)


def _selections(rows: Tensor, counts: Tensor, all_keys: bool) -> Iterator[tuple[int, Tensor, Tensor | slice]]:
    """Of each image with kept rows: its number, the kept rows, and the rows that are keys."""
    for image, count in enumerate(counts.tolist()):
        if count:
            kept = rows[image, :count].long()
            yield image, kept, slice(None) if all_keys else kept
