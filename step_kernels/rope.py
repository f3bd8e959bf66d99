"""Rotary position embeddings on packed tokens: a supertoken is rotated as a token at its centre would be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Tail, check_choice, check_device, check_no_grad, check_optional, check_tail, check_tensor
from .layout import SupertokenLayout
from .library import define
from .numerics import accumulator
from .packed import check_layout, check_rows

PRECISE = (torch.float32, torch.float64)


def rope_table(
    layout: SupertokenLayout, frequencies: Tensor, phases: Tensor | None = None, *, tail: Tail = "zero"
) -> Tensor:
    """Sines and cosines of every token's rotations, for `ragged_rope`; one table serves all blocks on a layout.

    A block of side s at (row, column) has its centre at (row + (s - 1) / 2, column + (s - 1) / 2), in cells. Equivalent PyTorch::

        angles = 2 * pi * (centres @ frequencies.T + phases)
        table = torch.cat((angles.sin(), angles.cos()), dim=1)     # prefix rows: zeros, ones, which rotate nothing

    Source: Su et al., "RoFormer" (arXiv 2104.09864); in two dimensions as EVA-02 (arXiv 2303.11331) and DINOv3 (arXiv 2508.10104).

    Args:
        layout: the tokens' layout.
        frequencies: [P, 2], float32 or float64: turns per cell down and per cell to the right, for each pair of channels.
        phases: [P], the same dtype: turns at the centre of cell (0, 0). None: zeros.
        tail: rows past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        [capacity, 2 * P] in the dtype of frequencies, P sines and then P cosines. No gradient.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; frequencies or phases require a gradient.
    """
    check_layout(layout, "frequencies", frequencies)
    check_tensor("frequencies", frequencies, ("P", 2), dtypes=PRECISE)
    check_optional("phases", phases, (frequencies.shape[0],), like=frequencies, like_name="frequencies")
    for name, value in (("frequencies", frequencies), ("phases", phases)):
        check_no_grad(name, value, "the table is a constant")
    return _rope_table(layout.cu_seqlens, layout.cells, frequencies, phases, check_tail(tail))


def ragged_rope(
    q: Tensor,
    k: Tensor,
    table: Tensor,
    *,
    rotate_half: bool = False,
    layout: SupertokenLayout | None = None,
    tail: Tail = "zero",
) -> tuple[Tensor, Tensor]:
    """Rotate the channels of queries and keys in pairs, for the rows up to the live count. Differentiable in q and k.

    Equivalent PyTorch, for a pair of channels (a, b) and its column of the table::

        a, b = a * cos - b * sin, b * cos + a * sin

    Args:
        q: [T, H, D], floating point; D even. A view of one qkv tensor is welcome.
        k: [T, G, D], q's dtype; another number of heads is legal.
        table: [T, D], of `rope_table`: float32, or float64 where q is. No gradient.
        rotate_half: pairs are channels (i, i + D / 2), as in DINOv3; False: (2i, 2i + 1), as in EVA-02.
        layout: the tokens' layout, whose capacity is T. None: all rows are live.
        tail: rows past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        q and k rotated, contiguous, in their dtype; computed in the table's.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; table requires a gradient.
    """
    cu_seqlens = check_rows("q", q, ("T", "H", "D"), layout)
    rows, _, width = q.shape
    check_tensor("k", k, (rows, "G", width), like=q, like_name="q", contiguous_last=True)
    if width % 2:
        raise ValueError(f"q: expected an even head dimension, got {width}")
    check_tensor("table", table, (rows, width), dtypes=(accumulator(q.dtype),), contiguous_last=True)
    check_device("table", table, q.device, "q")
    check_no_grad("table", table, "positions are constants")
    check_choice("rotate_half", rotate_half, (True, False))
    return _ragged_rope(q, k, table, cu_seqlens, rotate_half, check_tail(tail))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, table, cu_seqlens, rotate_half, _ = inputs
    ctx.save_for_backward(table, cu_seqlens)
    ctx.rotate_half = rotate_half


def _gradients(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    table, cu_seqlens = ctx.saved_tensors
    return *_ragged_rope_backward(grad_q, grad_k, table, cu_seqlens, ctx.rotate_half), None, None, None, None


_rope_table = define(
    "rope_table(Tensor cu_seqlens, Tensor cells, Tensor frequencies, Tensor? phases, bool fill_tail) -> Tensor",
    module="rope",
    fake=lambda cu_seqlens, cells, frequencies, *_: frequencies.new_empty(cells.shape[0], 2 * frequencies.shape[0]),
)
_ragged_rope_backward = define(
    "ragged_rope_backward(Tensor grad_q, Tensor grad_k, Tensor table, Tensor? cu_seqlens, bool rotate_half) "
    "-> (Tensor, Tensor)",
    module="rope",
    fake=lambda grad_q, grad_k, *_: (grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)),
)
_ragged_rope = define(
    "ragged_rope(Tensor q, Tensor k, Tensor table, Tensor? cu_seqlens, bool rotate_half, bool fill_tail) -> (Tensor, Tensor)",
    module="rope",
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    setup_context=_setup,
    backward=_gradients,
)
