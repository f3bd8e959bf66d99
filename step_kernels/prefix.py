"""Prefix tokens swapped for others: between an encoder and a mask-transformer decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Tail, check_capacity, check_tail, check_tensor
from .layout import SupertokenLayout
from .library import define
from .packed import check_layout


def replace_prefix(
    tokens: Tensor, layout: SupertokenLayout, new_prefix: Tensor, *, tail: Tail = "zero"
) -> tuple[Tensor, SupertokenLayout]:
    """The same tokens with other prefix tokens: a mask-transformer decoder swaps the encoder's CLS for its class tokens.

    Equivalent PyTorch, per image: ``torch.cat([new_prefix, image_tokens[layout.num_prefix:]])``. Differentiable in both tensors.

    Args:
        tokens: [capacity, D], floating point.
        layout: its layout.
        new_prefix: [P, D], the same for every image, or [B, P, D], each image's own; P may be 0.
        tail: rows of the result past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        tokens [capacity + B * (P - layout.num_prefix), D], and their layout (trimmed if the given one is).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    check_layout(layout, "tokens", tokens)
    check_tensor("tokens", tokens, (layout.capacity, "D"), contiguous_last=True)
    _check_prefix(new_prefix, tokens, layout.batch_size)
    fill = check_tail(tail)
    (rows, cols), prefix = layout.grid, new_prefix.shape[-2]
    check_capacity(layout.batch_size, rows, cols, prefix)
    out, cu_seqlens, cells = _replace_prefix(
        tokens, layout.cu_seqlens, layout.cells, new_prefix, layout.num_prefix, fill
    )
    expected = layout.expected_tokens
    if expected is not None:
        expected = max(0, expected + layout.batch_size * (prefix - layout.num_prefix))
    return out, SupertokenLayout.trusted(cu_seqlens, cells, layout.grid, prefix, layout.trimmed, expected)


def _check_prefix(new_prefix: Tensor, tokens: Tensor, batch_size: int) -> None:
    width, dim = tokens.shape[1], new_prefix.dim() if isinstance(new_prefix, Tensor) else 2
    if dim not in (2, 3):
        raise ValueError(
            f"new_prefix: expected shape [P, {width}] or [{batch_size}, P, {width}], got {list(new_prefix.shape)}"
        )
    check_tensor("new_prefix", new_prefix, (batch_size, "P", width)[3 - dim :], like=tokens, like_name="tokens")


def _fake_replace_prefix(
    tokens: Tensor, cu_seqlens: Tensor, cells: Tensor, prefix: Tensor, old_prefix: int, fill_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    capacity = tokens.shape[0] + (cu_seqlens.shape[0] - 1) * (prefix.shape[-2] - old_prefix)
    return (tokens.new_empty(capacity, tokens.shape[1]), torch.empty_like(cu_seqlens), cells.new_empty(capacity, 4))


def _setup_replace_prefix(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tokens, cu_seqlens, _, prefix, old_prefix, _ = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.sizes = tokens.shape[0], prefix.shape[-2], old_prefix, prefix.dim() == 3


def _replace_prefix_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    grad_tokens, grad_prefix = _replace_prefix_backward(grad, cu_seqlens, *ctx.sizes)
    return grad_tokens, None, None, grad_prefix, None, None


_replace_prefix_backward = define(
    "replace_prefix_backward(Tensor grad, Tensor cu_seqlens, SymInt capacity, SymInt prefix, SymInt old_prefix, "
    "bool per_image) -> (Tensor, Tensor)",
    module="prefix",
    fake=lambda grad, cu_seqlens, capacity, prefix, old_prefix, per_image: (
        grad.new_empty(capacity, grad.shape[1]),
        grad.new_empty(*[cu_seqlens.shape[0] - 1] * per_image, prefix, grad.shape[1]),
    ),
)
_replace_prefix = define(
    "replace_prefix(Tensor tokens, Tensor cu_seqlens, Tensor cells, Tensor new_prefix, SymInt old_prefix, bool fill_tail) "
    "-> (Tensor, Tensor, Tensor)",
    module="prefix",
    fake=_fake_replace_prefix,
    setup_context=_setup_replace_prefix,
    backward=_replace_prefix_gradients,
)
