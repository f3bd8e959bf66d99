"""Reference of attention within each image of a packed batch: scaled_dot_product_attention, images of one length at a time; and of its tile schedule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..numerics import accumulator
from ..schedule import TILE_ROWS, num_tiles

# What autograd calls for scaled_dot_product_attention on a CPU; an op's implementation runs below autograd.
fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

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
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D]; lse [H, T], the log of the sum of exp of each query's scores, or an empty tensor."""
    out = q.new_empty(q.shape)
    lse = q.new_zeros((q.shape[1], q.shape[0]) if save_lse else (0,), dtype=accumulator(q.dtype))
    images = list(image_rows(cu_seqlens))
    live = images[-1].stop if images else 0
    for rows, count in _equally_long(images):
        # [images, H, L, D] each
        outputs, queries, keys, values = (x[rows].unflatten(0, (count, -1)).transpose(1, 2) for x in (out, q, k, v))
        if save_lse and _is_fused(q, key_bias):
            outputs[:], sums = fused_attention(queries, keys, values, scale=scale)
            lse[:, rows] = sums.transpose(0, 1).flatten(1)
        else:
            outputs[:] = _attention(queries, keys, values, _mask(q, key_bias, rows, count), scale)
    if save_lse and not _is_fused(q, key_bias):
        for rows in images:
            bias = None if key_bias is None else key_bias[rows]
            lse[:, rows] = log_sum_exp(q[rows].transpose(0, 1), k[rows].transpose(0, 1), scale, bias)
    if _may_hide_nan(out[:live]):
        for rows in images:
            outputs, queries, keys, values = (x[rows].transpose(0, 1)[None] for x in (out, q, k, v))
            _with_nan(outputs, queries, keys, values, _mask(q, key_bias, rows, 1), scale)
    if live < out.shape[0]:
        out[live:] = 0
    return out, lse


def _equally_long(images: list[slice]) -> Iterator[tuple[slice, int]]:
    """Consecutive images of one length, at once: their rows, and how many they are."""
    for _, group in itertools.groupby(images, lambda rows: rows.stop - rows.start):
        alike = list(group)
        yield slice(alike[0].start, alike[-1].stop), len(alike)


def _mask(q: Tensor, key_bias: Tensor | None, rows: slice, count: int) -> Tensor | None:
    """[count, 1, 1, L] for images of one length."""
    return None if key_bias is None else key_bias[rows].to(accumulator(q.dtype)).view(count, 1, 1, -1)


def _is_fused(q: Tensor, key_bias: Tensor | None) -> bool:
    """Whether PyTorch's fused kernels of both passes are used: those of CPUs, which save the scores' sums."""
    return q.device.type == "cpu" and key_bias is None


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """scaled_dot_product_attention of [images, H, L, D] each."""
    if mask is not None and q.dtype != mask.dtype and q.device.type != "cpu":
        q, k, v = q.float(), k.float(), v.float()  # only CPUs mix dtypes here
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """scaled_dot_product_attention of [H, queries, D] among [H, keys, D] whose NaN stay NaN on a CPU, too."""
    operands = q[None], k[None], v[None]
    out = F.scaled_dot_product_attention(*operands, scale=scale)
    return (_with_nan(out, *operands, None, scale) if _may_hide_nan(out) else out)[0]


def score_chunks(
    q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of [H, queries, D] and [H, keys, D], a chunk of queries at a time: which, themselves and their scores, in the dtype of sums."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = k.to(accumulator(k.dtype)).mT
    done = 0
    for queries in q.split(QUERY_CHUNK, 1):
        chunk = slice(done, done + queries.shape[1])
        done = chunk.stop
        queries = queries.to(keys.dtype)
        scores = queries @ keys * scale
        yield chunk, queries, scores if bias is None else scores + bias.to(keys.dtype)


def log_sum_exp(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None = None) -> Tensor:
    """[H, queries]: log of the sum of exp of each query's scores; +inf where all are -inf, as such a row weighs nothing."""
    found = torch.cat([scores.logsumexp(-1) for _, _, scores in score_chunks(q, k, scale, bias)], 1)
    return found.masked_fill_(found.isneginf(), torch.inf)


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; zeros where all scores are -inf, as scaled_dot_product_attention has it."""
    return torch.softmax(scores, -1).masked_fill_(scores.amax(-1, keepdim=True).isneginf(), 0)


def attention_gradients(
    grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    *,
    bias: Tensor | None = None,
    grad_scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention [H, queries, D] among [H, keys, D] in q, k and v, in the dtype of sums.

    ``bias`` [keys] was added to the scores; ``grad_scores`` [queries, keys] adds to the gradient of every head's. ``grad`` None: nothing
    depends on the output, only on the scores. Written out, not by autograd: an op's implementation runs below autograd.
    """
    sums = accumulator(q.dtype)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = k.to(sums), v.to(sums)
    grad_queries, grad_keys, grad_values = [], torch.zeros_like(keys), torch.zeros_like(values)
    for chunk, queries, scores in score_chunks(q, k, scale, bias):
        of_scores = torch.zeros_like(scores)
        if grad is not None:
            weights = softmax(scores)
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


def _may_hide_nan(out: Tensor) -> bool:
    """Whether some row of attention's result [..., D] may be one of the following.

    PyTorch's fused CPU kernel writes zeros for some rows that should be NaN: scores with a NaN among fewer keys than a vector
    register holds, or with an overflow (seen in 2.11 to 2.15).
    """
    return out.device.type == "cpu" and not bool(out[..., 0].all())


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
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As PyTorch's fused kernel has them on a CPU, where ``out`` and ``lse`` hide no NaN; else written out, without the two."""
    grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows in image_rows(cu_seqlens):
        bias = None if key_bias is None else key_bias[rows]
        cotangent, queries, keys, values = (x[rows].transpose(0, 1) for x in (grad, q, k, v))
        if _is_fused(q, key_bias) and not _may_hide_nan(out[rows]) and bool(lse[:, rows].isfinite().all()):
            saved = out[rows].transpose(0, 1)[None], lse[None, :, rows]
            operands = cotangent[None], queries[None], keys[None], values[None]
            found = tuple(x[0] for x in fused_attention_backward(*operands, *saved, 0.0, False, scale=scale))
        else:
            found = attention_gradients(cotangent, queries, keys, values, scale, bias=bias)
        for target, gradient in zip(grads, found, strict=True):
            target[rows] = gradient.transpose(0, 1)
    return grads


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
