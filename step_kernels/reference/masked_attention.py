"""Reference of attention among kept tokens: each image's kept rows through scaled_dot_product_attention; and its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics import accumulator
from . import attention


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
        out[image][:, queries] = attend(*operands, scale)
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


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """[H, queries, D] attending to [H, keys, D]."""
    return attention.attention(q[None], k[None], v[None], scale)[0]


def log_sum_exp(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """[H, queries]: log of the sum of exp of each query's scores."""
    return torch.cat([attention.log_sum_exp(scores) for _, scores in _scores(q, k, scale)], 1)


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Iterator[tuple[Tensor, Tensor]]:
    """A chunk of queries at a time: its queries [H, chunk, D] and their scores [H, chunk, keys], in the dtype of sums."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.to(accumulator(k.dtype)).mT
    for queries in q.split(attention.QUERY_CHUNK, 1):
        queries = queries.to(keys.dtype)
        yield queries, queries @ keys * scale


def attention_gradients(
    grad: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float | None, grad_scores: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend`` in q, k and v, in the dtype of sums; ``grad_scores`` [queries, keys] adds to that of every head's scores.

    ``grad`` None: nothing depends on the output, only on the scores.

    Written out, not by autograd: an op's implementation runs below autograd.
    """
    sums = accumulator(q.dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = k.to(sums), v.to(sums)
    grad_queries, grad_keys, grad_values = [], torch.zeros_like(keys), torch.zeros_like(values)
    done = 0
    for queries, scores in _scores(q, k, scale):
        chunk = slice(done, done + queries.shape[1])
        done = chunk.stop
        of_scores = torch.zeros_like(scores)
        if grad is not None:
            weights = attention.softmax(scores)
            grad_out = grad[:, chunk].to(sums)
            grad_values += weights.mT @ grad_out
            grad_weights = grad_out @ values.mT
            # softmax: dS = P * (dP - sum_j P_j dP_j)
            of_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        if grad_scores is not None:
            of_scores += grad_scores[chunk]
        of_scores *= factor
        grad_keys += of_scores.mT @ queries
        grad_queries.append(of_scores @ keys)
    return torch.cat(grad_queries, 1), grad_keys, grad_values
