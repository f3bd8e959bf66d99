"""Attention among the kept tokens of a dense batch: early exits and token pruning inside plain ViT code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_choice, check_device, check_head_dim, check_number, check_tensor
from .library import define
from .numerics import accumulator

KEYS = ("kept", "all")


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, keys: str = "kept", scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale) v, where only kept tokens ask; all other rows are exactly zero. Differentiable in q, k and v.

    Equivalent PyTorch::

        mask = keep[:, None, None, :] if keys == "kept" else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = torch.where(keep[:, None, :, None], out, 0)

    except that rows which are not kept are never read (with ``keys="all"``: never read as queries), so that a NaN in them reaches neither
    the output nor a gradient, and that an image without kept tokens gives zeros.

    Args:
        q, k, v: [B, H, L, D] each, floating point, one dtype, any strides with a contiguous last dimension: permuted views of one
            [B, L, 3, H, D] are welcome. D up to 256.
        keep: bool [B, L], True for the tokens that take part.
        keys: ``"kept"``: kept tokens attend to kept tokens; ``"all"``: to every token of their image.
        scale: of the scores. None: 1 / sqrt(D).

    Returns:
        [B, H, L, D] in q's dtype, stored as a contiguous [B, L, H, D], so that ``out.transpose(1, 2).flatten(2)``, which a projection
        wants next, copies nothing.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    check_tensor("q", q, ("B", "H", "L", "D"), contiguous_last=True)
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, tuple(q.shape), like=q, like_name="q", contiguous_last=True)
    check_head_dim("q", q)
    check_tensor("keep", keep, (q.shape[0], q.shape[2]), dtypes=(torch.bool,))
    check_device("keep", keep, q.device, "q")
    check_choice("keys", keys, KEYS)
    scale = None if scale is None else check_number("scale", scale)
    rows, counts = _kept_rows(keep)
    save_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _masked_attention(q, k, v, rows, counts, keys == "all", scale, save_lse)[0]


def rows_first(like: Tensor) -> Tensor:
    """An empty [B, H, L, D] like ``like``, stored as [B, L, H, D]."""
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


def _fake_masked_attention(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    save_lse = rest[-1]
    return rows_first(q), q.new_empty(q.shape[:3] if save_lse else (0,), dtype=accumulator(q.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rows, counts, all_keys, scale, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, rows, counts)
    ctx.all_keys, ctx.scale = all_keys, scale


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_masked_attention_backward(grad, *ctx.saved_tensors, ctx.all_keys, ctx.scale), *[None] * 5


_kept_rows = define(
    "kept_rows(Tensor keep) -> (Tensor, Tensor)",
    module="masked_attention",
    fake=lambda keep: (keep.new_empty(keep.shape, dtype=torch.int32), keep.new_empty(keep.shape[0], dtype=torch.int32)),
)
_masked_attention_backward = define(
    "masked_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rows, "
    "Tensor counts, bool all_keys, float? scale) -> (Tensor, Tensor, Tensor)",
    module="masked_attention",
    fake=lambda grad, q, *_: (rows_first(q), rows_first(q), rows_first(q)),
)
_masked_attention = define(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor counts, bool all_keys, float? scale, "
    "bool save_lse) -> (Tensor, Tensor)",
    module="masked_attention",
    fake=_fake_masked_attention,
    setup_context=_setup,
    backward=_gradients,
)
