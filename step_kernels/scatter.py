"""Scatter-back: supertokens' values to the patch grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATING, check_device, check_no_grad, check_tensor
from .layout import SupertokenLayout
from .library import define
from .packed import check_layout


def scatter_back(values: Tensor, layout: SupertokenLayout, *, where: Tensor | None = None) -> Tensor:
    """Each token's values in every cell it covers, zero elsewhere. Differentiable in values.

    Equivalent PyTorch::

        canvas = values.new_zeros(B, C, rows, cols)
        for i, (b, r, c, s) in enumerate(layout.cells[:layout.num_tokens].tolist()):
            if where is None or where[i]:
                canvas[b, :, r:r + s, c:c + s] = values[i, :, None, None]

    Args:
        values: [capacity, C], floating point.
        layout: the tokens' layout; prefix tokens cover no cell.
        where: bool [capacity], the tokens to take. None: all.

    Returns:
        [B, C, rows, cols] in values' dtype, channels_last.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    check_values("values", values, layout, where)
    # Permuted out here: autograd lets nobody write into a view that an op returns.
    return _scatter_back(values, layout.cu_seqlens, layout.cells, *layout.grid, where).permute(0, 3, 1, 2)


def scatter_into(canvas: Tensor, values: Tensor, layout: SupertokenLayout, *, where: Tensor | None = None) -> Tensor:
    """``scatter_back`` into an existing canvas, in place; cells that no selected token covers keep their value. No autograd.

    Equivalent PyTorch: the loop of ``scatter_back``, on the given canvas.

    Args:
        canvas: [B, C, rows, cols], floating point, any strides (overlapping ones excepted); values are converted to its dtype.
        values, layout, where: as in ``scatter_back``.

    Returns:
        The same canvas.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; a gradient would be required.
    """
    check_values("values", values, layout, where)
    check_canvas(canvas, values.shape[1], layout)
    for name, tensor in (("canvas", canvas), ("values", values)):
        check_no_grad(name, tensor, "writing in place has no autograd; use scatter_back")
    _scatter_into(canvas, values.detach(), layout.cu_seqlens, layout.cells, where)
    return canvas


def check_values(name: str, values: Tensor, layout: SupertokenLayout, where: Tensor | None) -> None:
    """Values of tokens [capacity, C] and a selection bool [capacity] that fit the layout."""
    check_layout(layout, name, values)
    check_tensor(name, values, (layout.capacity, "C"), contiguous_last=True)
    if where is not None:
        check_tensor("where", where, (layout.capacity,), dtypes=(torch.bool,))
        check_device("where", where, values.device, name)


def check_canvas(canvas: Tensor, channels: int, layout: SupertokenLayout) -> None:
    """A canvas [B, C, rows, cols] that fits the layout and that can be written to."""
    check_tensor("canvas", canvas, (layout.batch_size, channels, *layout.grid), dtypes=FLOATING)
    check_device("canvas", canvas, layout.device, "layout")
    if torch.compiler.is_compiling():
        return  # strides may be symbols there, which cannot be sorted
    if _overlaps(canvas):
        raise ValueError(f"canvas: expected memory of its own for each entry, got strides {list(canvas.stride())}")
    if canvas.is_neg():  # PyTorch hands an op a copy
        raise ValueError("canvas: expected a tensor whose memory holds its values, got a negated view")


def _overlaps(x: Tensor) -> bool:
    """Whether two entries may share memory: a dimension steps over less than the denser ones reach."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def _setup_scatter_back(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cu_seqlens, cells, _, _, where = inputs
    ctx.save_for_backward(cu_seqlens, cells, where)


def _scatter_back_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _scatter_back_backward(grad, *ctx.saved_tensors), None, None, None, None, None


_scatter_back_backward = define(
    "scatter_back_backward(Tensor grad, Tensor cu_seqlens, Tensor cells, Tensor? where) -> Tensor",
    module="scatter",
    fake=lambda grad, cu_seqlens, cells, where: grad.new_empty(cells.shape[0], grad.shape[3]),
)
_scatter_back = define(
    "scatter_back(Tensor values, Tensor cu_seqlens, Tensor cells, SymInt rows, SymInt cols, Tensor? where) -> Tensor",
    module="scatter",
    fake=lambda values, cu_seqlens, cells, rows, cols, where: values.new_empty(
        cu_seqlens.shape[0] - 1, rows, cols, values.shape[1]
    ),
    setup_context=_setup_scatter_back,
    backward=_scatter_back_gradients,
)
_scatter_into = define(
    "scatter_into(Tensor(a!) canvas, Tensor values, Tensor cu_seqlens, Tensor cells, Tensor? where) -> ()",
    module="scatter",
    fake=lambda canvas, values, cu_seqlens, cells, where: None,
)
