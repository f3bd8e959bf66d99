"""Merging tokens and its gradient: one kernel each (a second one for the prefix's), see blocks.py."""

from __future__ import annotations

from torch import Tensor

from .blocks import expand_blocks_, reduce_blocks
from .prefix_rows import sum_prefix_rows


def merge_tokens(
    tokens: Tensor, cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int, prefix: Tensor | None, fill_tail: bool
) -> Tensor:
    features = tokens.unflatten(1, (rows, cols))
    return reduce_blocks(features, cu_seqlens, cells, mean=True, prefix=prefix, fill_tail=fill_tail)


def merge_tokens_backward(
    grad: Tensor, cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    grad_tokens = grad.new_empty(cu_seqlens.shape[0] - 1, rows, cols, grad.shape[1])
    expand_blocks_(grad_tokens, grad, cu_seqlens, cells, mean=True, fill_zero=True)
    return grad_tokens.flatten(1, 2), sum_prefix_rows(grad, cu_seqlens, num_prefix)
