"""Reference of the swap of prefix tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import live_count, prefix_rows


def replace_prefix(
    tokens: Tensor, cu_seqlens: Tensor, cells: Tensor, new_prefix: Tensor, old_prefix: int, fill_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, count = cu_seqlens.shape[0] - 1, new_prefix.shape[-2]
    old, new, new_cu_seqlens = _kept_rows(cu_seqlens, old_prefix, count)
    capacity = tokens.shape[0] + batch_size * (count - old_prefix)
    prefix = prefix_rows(new_cu_seqlens, count)
    new_tokens = tokens.new_zeros(capacity, tokens.shape[1])
    new_tokens[new] = tokens[old]
    new_tokens[prefix] = new_prefix
    new_cells = cells.new_zeros(capacity, 4)
    new_cells[new] = cells[old]
    new_cells[prefix, 0] = torch.arange(batch_size, dtype=cells.dtype, device=cells.device)[:, None]
    return new_tokens, new_cu_seqlens, new_cells


def replace_prefix_backward(
    grad: Tensor, cu_seqlens: Tensor, capacity: int, prefix: int, old_prefix: int, per_image: bool
) -> tuple[Tensor, Tensor]:
    old, new, new_cu_seqlens = _kept_rows(cu_seqlens, old_prefix, prefix)
    grad_tokens = grad.new_zeros(capacity, grad.shape[1])
    grad_tokens[old] = grad[new]
    grad_prefix = grad[prefix_rows(new_cu_seqlens, prefix)]
    return grad_tokens, grad_prefix if per_image else grad_prefix.sum(0)


def _kept_rows(cu_seqlens: Tensor, old_prefix: int, new_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the tokens that stay, before and after the swap (int64 [n] each), and the new cu_seqlens."""
    image = torch.arange(cu_seqlens.shape[0], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    new_cu_seqlens = cu_seqlens + image * (new_prefix - old_prefix)
    row = torch.arange(live_count(cu_seqlens, 0), device=cu_seqlens.device)
    owner = torch.bucketize(row, cu_seqlens[1:], right=True)
    start = cu_seqlens[:-1][owner]
    old = row[row - start >= old_prefix]
    return old, old + (new_cu_seqlens[:-1] - cu_seqlens[:-1] + new_prefix - old_prefix)[owner[old]], new_cu_seqlens
