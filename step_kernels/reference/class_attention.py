"""Reference of class queries attending to each image's tokens: scaled_dot_product_attention, one image at a time; of bare scores; gradients."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..numerics import accumulator
from .attention import attention_gradients, image_rows, log_sum_exp, plain_attention
from .cells import unless_missing


def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    with_scores: bool,
    save_lse: bool,
    fill_tail: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, H, D]; mean scores [T, C]; lse [B, H, C], the log of the sum of exp of each query's scores. Or empty tensors."""
    batch, classes, heads, head_dim = q.shape
    sums = accumulator(q.dtype)
    scale = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(q.shape)
    scores = q.new_zeros((k.shape[0], classes) if with_scores else (0,))
    lse = q.new_zeros((batch, heads, classes) if save_lse else (0,), dtype=sums)
    for image, rows in _images(cu_seqlens):
        queries, keys, values = (x.transpose(0, 1) for x in (q[image], k[rows], v[rows]))  # [H, C or tokens, D]
        out[image] = plain_attention(queries, keys, values, scale).transpose(0, 1)
        if with_scores:  # the mean over heads of q . k is a dot product over all channels
            scores[rows] = _dot_products(k[rows].flatten(1), q[image].flatten(1), scale / max(heads, 1))
        if save_lse:
            lse[image] = log_sum_exp(queries, keys, scale)
    return out, scores, lse


def class_attention_backward(
    grad: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    fill_tail: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for image, rows in _images(cu_seqlens):
        queries, keys, values = (x.transpose(0, 1) for x in (q[image], k[rows], v[rows]))
        grad_out = None if grad is None else grad[image].transpose(0, 1)
        of_scores = None
        if grad_scores is not None:
            of_scores = grad_scores[rows].to(accumulator(q.dtype)).mT / q.shape[2]  # [C, tokens]
        found = attention_gradients(grad_out, queries, keys, values, scale, grad_scores=of_scores)
        for target, gradient in zip((grads[0][image], grads[1][rows], grads[2][rows]), found, strict=True):
            target.copy_(gradient.transpose(0, 1))
    return grads


def class_scores(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float, fill_tail: bool) -> Tensor:
    scores = q.new_zeros(k.shape[0], q.shape[1])
    for image, rows in _images(cu_seqlens):
        scores[rows] = _dot_products(k[rows], q[image], scale)
    return scores


def class_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float, fill_tail: bool, needed: list[bool]
) -> tuple[Tensor, ...]:
    grad_q, grad_k = (x.new_zeros(x.shape) if want else None for x, want in zip((q, k), needed, strict=True))
    for image, rows in _images(cu_seqlens):
        if grad_q is not None:
            grad_q[image] = _dot_products(grad[rows].mT, k[rows].mT, scale)
        if grad_k is not None:
            grad_k[rows] = _dot_products(grad[rows], q[image].mT, scale)
    return unless_missing(q, grad_q, grad_k)


def _dot_products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Of each row of a with each row of b, times scale: summed in the dtype of sums, in a's dtype."""
    sums = accumulator(a.dtype)
    return (a.to(sums) @ b.to(sums).mT * scale).to(a.dtype)


def _images(cu_seqlens: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and rows of each image that has any."""
    lengths = cu_seqlens.diff().tolist()
    return zip((i for i, length in enumerate(lengths) if length), image_rows(cu_seqlens), strict=True)
