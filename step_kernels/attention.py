"""Attention within each image of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import check_device, check_int, check_no_grad, check_tail, check_tensor
from .library import define
from .validation import validate_cu_seqlens

MAX_HEAD_DIM = 256


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    schedule: None = None,
    tail: str = "zero",
) -> Tensor:
    """softmax(q k^T * scale + key_bias) v within each image. Differentiable in q, k and v.

    Equivalent PyTorch, for image b with rows ``s = slice(cu_seqlens[b], cu_seqlens[b + 1])``::

        F.scaled_dot_product_attention(*(x[s].transpose(0, 1) for x in (q, k, v)), attn_mask=key_bias[s], scale=scale)

    Args:
        q, k, v: [T, H, D] each, floating point, one dtype; views of one qkv tensor are welcome. D up to 256.
        cu_seqlens: int32 [B + 1], starts at 0, monotone, ends within T.
        max_seqlen: a bound on the tokens of one image; an over-estimate is legal.
        scale: of the scores. None: 1 / sqrt(D).
        key_bias: [T], floating point, added to every score of a key: log of a supertoken's number of cells gives
            proportional attention (ToMe, arXiv 2210.09461). No gradient.
        schedule: None. Tile schedules belong to the Triton kernel, which this version does not have.
        tail: rows past ``cu_seqlens[-1]``: ``"zero"`` or ``"undefined"``.

    Returns:
        [T, H, D], contiguous, in q's dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; key_bias requires a gradient.
    """
    check_tensor("q", q, ("T", "H", "D"), contiguous_last=True)
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, tuple(q.shape), like=q, like_name="q", contiguous_last=True)
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dimension between 1 and {MAX_HEAD_DIM}, got {q.shape[2]}")
    check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), dtypes=(torch.int32,))
    check_device("cu_seqlens", cu_seqlens, q.device, "q")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: expected at least 1 entry (B + 1), got 0")
    check_int("max_seqlen", max_seqlen, minimum=0)
    scale = None if scale is None else checks.check_number("scale", scale)
    if schedule is not None:
        raise TypeError(f"schedule: expected None in this version, got {checks.describe(schedule)}")
    if key_bias is not None:
        check_tensor("key_bias", key_bias, (q.shape[0],))
        check_device("key_bias", key_bias, q.device, "q")
        check_no_grad("key_bias", key_bias, "key_bias has no gradient")
    if checks.CHECK_VALUES:
        validate_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0])
        _validate_max_seqlen(cu_seqlens, max_seqlen)
    return _ragged_attention(q, k, v, cu_seqlens, max_seqlen, scale, key_bias, check_tail(tail))


def _validate_max_seqlen(cu_seqlens: Tensor, max_seqlen: int) -> None:
    longest = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least {longest}, the longest image of cu_seqlens, got {max_seqlen}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_seqlens, _, scale, key_bias, _ = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, key_bias)
    ctx.scale = scale


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, key_bias = ctx.saved_tensors
    return *_ragged_attention_backward(grad, q, k, v, cu_seqlens, ctx.scale, key_bias), *[None] * 5


_ragged_attention_backward = define(
    "ragged_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float? scale, "
    "Tensor? key_bias) -> (Tensor, Tensor, Tensor)",
    module="attention",
    fake=lambda grad, q, *_: (q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)),
)
_ragged_attention = define(
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float? scale, Tensor? key_bias, "
    "bool fill_tail) -> Tensor",
    module="attention",
    fake=lambda q, *_: q.new_empty(q.shape),
    setup_context=_setup,
    backward=_gradients,
)
