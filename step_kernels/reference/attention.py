"""Reference of attention within each image of a packed batch: scaled_dot_product_attention, one image at a time; and of its tile schedule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..numerics import accumulator
from ..schedule import TILE_ROWS, num_tiles

QUERY_CHUNK = 512  # rows of scores that the backward pass holds at once


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    schedule: Tensor | None,
    save_lse: bool,
    fill_tail: bool,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D]; lse [H, T], the log of the sum of exp of each query's scores, or an empty tensor."""
    out = q.new_empty(q.shape)
    lse = q.new_zeros((q.shape[1], q.shape[0]) if save_lse else (0,), dtype=accumulator(q.dtype))
    images = list(image_rows(cu_seqlens))
    for rows in images:
        inputs = _image(q, k, v, key_bias, rows)
        out[rows] = F.scaled_dot_product_attention(*inputs, scale=scale)[0].transpose(0, 1)
        if save_lse:
            for chunk, _, scores in _scores(q, k, rows, key_bias, scale):
                lse[:, chunk] = log_sum_exp(scores)
    if _may_hide_nan(out[: int(cu_seqlens[-1])]):
        for rows in images:
            found = out[rows].transpose(0, 1)[None]
            out[rows] = _with_nan(found, *_image(q, k, v, key_bias, rows), scale)[0].transpose(0, 1)
    out[int(cu_seqlens[-1]) :] = 0
    return out, lse


def _image(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values [1, H, L, D] and the mask of one image, as scaled_dot_product_attention takes them."""
    queries, keys, values = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
    mask = None if key_bias is None else key_bias[rows].to(accumulator(q.dtype))[None, None, None]
    if mask is not None and q.dtype != mask.dtype and q.device.type != "cpu":
        return queries.float(), keys.float(), values.float(), mask  # only CPUs mix dtypes here
    return queries, keys, values, mask


def _scores(
    q: Tensor, k: Tensor, rows: slice, key_bias: Tensor | None, scale: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of one image, a chunk of queries at a time: their rows, the queries [H, chunk, D] and their scores [H, chunk, L]."""
    sums = accumulator(q.dtype)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    keys = k[rows].to(sums).permute(1, 2, 0)  # [H, D, L]
    bias = 0 if key_bias is None else key_bias[rows].to(sums)
    for first in range(rows.start, rows.stop, QUERY_CHUNK):
        chunk = slice(first, min(first + QUERY_CHUNK, rows.stop))
        queries = q[chunk].to(sums).transpose(0, 1)
        yield chunk, queries, queries @ keys * scale + bias


def log_sum_exp(scores: Tensor) -> Tensor:
    """Over the last dimension; +inf where all scores are -inf, as such a row weighs nothing."""
    found = scores.logsumexp(-1)
    return found.masked_fill_(found.isneginf(), torch.inf)


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; zeros where all scores are -inf, as scaled_dot_product_attention has it."""
    return torch.softmax(scores, -1).masked_fill_(scores.amax(-1, keepdim=True).isneginf(), 0)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """scaled_dot_product_attention [1, H, L, D] whose NaN stay NaN on a CPU, too."""
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return _with_nan(out, q, k, v, None, scale) if _may_hide_nan(out) else out


def _may_hide_nan(out: Tensor) -> bool:
    """Whether some row of attention's result [..., D] may be one of the following.

    PyTorch's fused CPU kernel writes zeros for some rows that should be NaN: scores with a NaN among fewer keys than a vector
    register holds, or with an overflow (seen in 2.11 to 2.15).
    """
    return out.device.type == "cpu" and bool((out[..., 0] == 0).any())


def _with_nan(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """``out`` [1, H, L, D], in place, with its rows of zeros computed anew."""
    zero = (out == 0).all(-1, keepdim=True)  # [1, H, L, 1]
    suspects = zero.any(1).flatten().nonzero().flatten()
    for rows in suspects.split(QUERY_CHUNK) if suspects.numel() else ():
        with sdpa_kernel(SDPBackend.MATH):
            again = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask, scale=scale)
        out[:, :, rows] = torch.where(zero[:, :, rows], again, out[:, :, rows])
    return out


def ragged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    schedule: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Written out, not by autograd: an op's implementation runs below autograd. Scores exist for a chunk of queries at a time.

    ``out`` and ``lse``, which spare a kernel a pass over the keys, are not needed.
    """
    grads = grad.new_zeros(3, *q.shape)
    sums = accumulator(q.dtype)
    factor = q.shape[2] ** -0.5 if scale is None else scale
    for rows in image_rows(cu_seqlens):
        keys, values = (x[rows].to(sums).transpose(0, 1) for x in (k, v))  # [H, L, D]
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for chunk, queries, scores in _scores(q, k, rows, key_bias, scale):
            grad_out = grad[chunk].to(sums).transpose(0, 1)  # [H, chunk, D]
            weights = softmax(scores)
            grad_values += weights.mT @ grad_out
            grad_weights = grad_out @ values.mT
            # softmax: dS = P * (dP - sum_j P_j dP_j)
            grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * factor
            grad_keys += grad_scores.mT @ queries
            grads[0, chunk] = (grad_scores @ keys).transpose(0, 1).to(grads.dtype)
        grads[1, rows] = grad_keys.transpose(0, 1).to(grads.dtype)
        grads[2, rows] = grad_values.transpose(0, 1).to(grads.dtype)
    return grads[0].clone(), grads[1].clone(), grads[2].clone()


def image_rows(cu_seqlens: Tensor) -> Iterator[slice]:
    """The rows of each image that has any."""
    bounds = cu_seqlens.tolist()
    return (slice(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start)


def attention_schedule(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """int32 [num_tiles(num_rows, B), 4]: first row of the tile, first row and end of its image, image."""
    lengths = cu_seqlens.diff().long()
    order = lengths.argsort(descending=True, stable=True)
    counts = (lengths[order] + TILE_ROWS - 1) // TILE_ROWS
    image = order.repeat_interleave(counts)
    index = torch.arange(image.shape[0], device=image.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    begin, end = cu_seqlens[image], cu_seqlens[image + 1]
    spare = num_tiles(num_rows, lengths.shape[0]) - image.shape[0]
    tail = (cu_seqlens[-1].long() + TILE_ROWS * torch.arange(spare, device=image.device)).clamp(max=num_rows)
    tiles = torch.stack([begin + index * TILE_ROWS, begin, end, image], 1)
    rest = torch.stack([tail, torch.zeros_like(tail), torch.zeros_like(tail), torch.full_like(tail, -1)], 1)
    return torch.cat([tiles, rest]).int()
