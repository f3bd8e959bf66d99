"""Scatter-back and its gradient: one kernel each, see common/cells.py."""

from __future__ import annotations

from torch import Tensor

from .common.cells import expand_blocks_, reduce_blocks


def scatter_back(
    values: Tensor, cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int, where: Tensor | None
) -> Tensor:
    features = values.new_empty(cu_seqlens.shape[0] - 1, rows, cols, values.shape[1])
    return expand_blocks_(features, values, cu_seqlens, cells, where=where, fill_zero=True)


def scatter_back_backward(grad: Tensor, cu_seqlens: Tensor, cells: Tensor, where: Tensor | None) -> Tensor:
    return reduce_blocks(grad, cu_seqlens, cells, mean=False, where=where)


def scatter_into(canvas: Tensor, values: Tensor, cu_seqlens: Tensor, cells: Tensor, where: Tensor | None) -> None:
    expand_blocks_(canvas.permute(0, 2, 3, 1), values, cu_seqlens, cells, where=where, fill_zero=False)
