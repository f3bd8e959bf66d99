"""Class queries against the tokens of each image, as attention or as bare scores: what mask-transformer and ATM heads ask of a packed batch."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from . import checks
from .checks import Tail, check_head_dim, check_number, check_tail, check_tensor
from .layout import SupertokenLayout
from .library import define, empty_of, those
from .numerics import accumulator
from .packed import check_longest, check_segments


@overload
def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SupertokenLayout,
    /,
    *,
    scale: float | None = None,
    return_scores: bool = False,
    tail: Tail = "zero",
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    return_scores: bool = False,
    tail: Tail = "zero",
) -> Tensor | tuple[Tensor, Tensor]: ...
def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | SupertokenLayout,
    max_seqlen: int | None = None,
    *,
    scale: float | None = None,
    return_scores: bool = False,
    tail: Tail = "zero",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v of C class queries over each image's tokens. Differentiable in q, k and v, through both results.

    ``class_attention(q, k, v, layout)``, or ``class_attention(q, k, v, cu_seqlens, max_seqlen)``.

    Equivalent PyTorch, for image b with rows ``s = slice(cu_seqlens[b], cu_seqlens[b + 1])``::

        scores = torch.einsum("chd,thd->htc", q[b], k[s]) * scale
        out[b] = torch.einsum("htc,thd->chd", scores.softmax(1), v[s])
        mean_scores[s] = scores.mean(0)

    The scores are the mask logits of attention-to-mask heads (SegViT, arXiv 2210.05844; DToP, arXiv 2308.01045).

    Args:
        q: [B, C, H, D], floating point: C queries per image. Queries that all images share are an expanded view.
        k, v: [T, H, D] each, of q's dtype; views of one tensor are welcome. D up to 256.
        cu_seqlens: a layout of capacity T, or int32 [B + 1] that starts at 0, is monotone and ends within T.
        max_seqlen: beside cu_seqlens only, a bound on the tokens of one image, for checks: no kernel reads it. An over-estimate is legal.
        scale: of the scores. None: 1 / sqrt(D).
        return_scores: also return the scores before the softmax, averaged over heads.
        tail: rows of the scores (and of the gradients of k and v) past ``cu_seqlens[-1]``: ``"zero"`` or ``"undefined"``.

    Returns:
        [B, C, H, D], contiguous, in q's dtype; zeros for an image without tokens. With ``return_scores`` a pair of it and the scores
        [T, C] in q's dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on a CPU also wrong values of cu_seqlens and max_seqlen.
    """
    check_tensor("q", q, ("B", "C", "H", "D"), contiguous_last=True)
    check_head_dim("q", q)
    check_tensor("k", k, ("T", *q.shape[2:]), like=q, like_name="q", contiguous_last=True)
    check_tensor("v", v, tuple(k.shape), like=q, like_name="q", contiguous_last=True)
    given, cu_seqlens = cu_seqlens, _segments_of(cu_seqlens, k, q)
    check_longest(max_seqlen, given)
    scale = None if scale is None else check_number("scale", scale)
    if not isinstance(return_scores, bool):
        raise TypeError(f"return_scores: expected a bool, got {checks.describe(return_scores)}")
    fill_tail = check_tail(tail)
    save_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out, scores, _ = _class_attention(q, k, v, cu_seqlens, scale, return_scores, save_lse, fill_tail)
    return (out, scores) if return_scores else out


def class_scores(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | SupertokenLayout, *, scale: float = 1.0, tail: Tail = "zero"
) -> Tensor:
    """Dot products of each token with the C class vectors of its own image. Differentiable in q and k.

    Equivalent PyTorch, for image b with rows ``s = slice(cu_seqlens[b], cu_seqlens[b + 1])``::

        scores[s] = k[s] @ q[b].T * scale

    With unit vectors, and class vectors from class tokens, these are the masks of Segmenter's mask transformer (arXiv 2105.05633).

    Args:
        q: [B, C, D], floating point: C class vectors per image. Vectors that all images share are an expanded view.
        k: [T, D], of q's dtype. D at least 1.
        cu_seqlens: a layout of capacity T, or int32 [B + 1] that starts at 0, is monotone and ends within T.
        scale: of the scores.
        tail: rows of the result (and of the gradient of k) past ``cu_seqlens[-1]``: ``"zero"`` or ``"undefined"``.

    Returns:
        [T, C], contiguous, in q's dtype; sums in fp32 (fp64 of fp64).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on a CPU also wrong values of cu_seqlens.
    """
    check_tensor("q", q, ("B", "C", "D"), contiguous_last=True)
    if q.shape[2] < 1:
        raise ValueError("q: expected vectors of at least 1 channel, got 0")
    check_tensor("k", k, ("T", q.shape[2]), like=q, like_name="q", contiguous_last=True)
    cu_seqlens = _segments_of(cu_seqlens, k, q)
    scale = check_number("scale", scale)
    fill_tail = check_tail(tail)
    return _class_scores(q, k, cu_seqlens, scale, fill_tail)


def _segments_of(given: object, k: Tensor, q: Tensor) -> Tensor:
    """The cu_seqlens of k's rows, with the B of q [B, ...]."""
    cu_seqlens = check_segments(given, "k", k)
    check_tensor("q", q, (cu_seqlens.shape[0] - 1, *q.shape[1:]))
    return cu_seqlens


def _fake_class_attention(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, classes, heads, _), (with_scores, save_lse, _) = q.shape, rest[-3:]
    return (
        q.new_empty(q.shape),
        q.new_empty((k.shape[0], classes) if with_scores else (0,)),
        q.new_empty((batch, heads, classes) if save_lse else (0,), dtype=accumulator(q.dtype)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, scale, with_scores, _, fill_tail = inputs
    out, _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
    ctx.scale, ctx.with_scores, ctx.fill_tail = scale, with_scores, fill_tail
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, grad_scores: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.with_scores:
        grad_scores = None  # tracing makes an empty one
    if grad is None and grad_scores is None:
        return (None,) * 8
    grads = _class_attention_backward(grad, grad_scores, *ctx.saved_tensors, ctx.scale, ctx.fill_tail)
    return *grads, *[None] * 5


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, cu_seqlens, ctx.scale, ctx.fill_tail = inputs
    ctx.save_for_backward(q, k, cu_seqlens)


def _gradients_of_scores(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:2])
    found = _class_scores_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.fill_tail, needed)
    return *those(needed, found), None, None, None


_class_attention_backward = define(
    "class_attention_backward(Tensor? grad, Tensor? grad_scores, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, float? scale, bool fill_tail) -> (Tensor, Tensor, Tensor)",
    module="class_attention",
    fake=lambda grad, grad_scores, q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)),
)
_class_attention = define(
    "class_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float? scale, bool with_scores, bool save_lse, "
    "bool fill_tail) -> (Tensor, Tensor, Tensor)",
    module="class_attention",
    fake=_fake_class_attention,
    setup_context=_setup,
    backward=_gradients,
)
_class_scores_backward = define(
    "class_scores_backward(Tensor grad, Tensor q, Tensor k, Tensor cu_seqlens, float scale, bool fill_tail, "
    "bool[] needed) -> (Tensor, Tensor)",
    module="class_attention",
    fake=lambda grad, q, k, *rest: empty_of(rest[-1], q, (q.shape, k.shape)),
)
_class_scores = define(
    "class_scores(Tensor q, Tensor k, Tensor cu_seqlens, float scale, bool fill_tail) -> Tensor",
    module="class_attention",
    fake=lambda q, k, *_: q.new_empty(k.shape[0], q.shape[1]),
    setup_context=_setup_scores,
    backward=_gradients_of_scores,
)
