"""masked_attention: kept rows are listed once, then attention tiles read them through the list.

Equivalent PyTorch: ``reference/masked_attention.py``. ``kept_rows_kernel`` lists each image's kept rows and then the others: the tiles at
the end of the list own the rows that become zero. Attention itself: ``cross_attention``. Device kernels: 2 forward, 2 backward, fills
included. Bytes of the list: keep once per chunk of an image (a byte per token), rows once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masked_attention import rows_first
from .common.launch import OPTIONS, ceil_div, on_device_of
from .cross_attention.launch import Operand, Rows, launch_backward, launch_forward, operand

# Not measured on a GPU yet.
CHUNK = 1024  # tokens that one program lists: each reads the image's whole mask, so fewer would read it more often
COUNT = 4096  # tokens of the mask counted at a time, 32 bytes per thread


@triton.jit
def _kept(keep_ptr, row, stride, mask):
    """1 where a row is kept, else 0: any byte but 0 is True."""
    return (tl.load(keep_ptr + row.to(tl.int64) * stride, mask=mask, other=0) != 0).to(tl.int32)


@triton.jit  # a length that is a multiple of 16 lets the mask be read 16 bytes at a time
def kept_rows_kernel(rows_ptr, counts_ptr, keep_ptr, keep_strides, length, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """rows [B, length]: kept rows, then the others, both ascending; counts [B]. Grid: B * cdiv(length, CHUNK)."""
    chunks = tl.cdiv(length, CHUNK)
    chunk = tl.program_id(0) % chunks
    image = (tl.program_id(0) // chunks).to(tl.int64)
    keep_ptr += image * keep_strides[0]
    first = chunk * CHUNK
    before = tl.zeros([COUNT], tl.int32)
    total = tl.zeros([COUNT], tl.int32)
    for start in range(0, length, COUNT):
        row = start + tl.arange(0, COUNT)
        kept = _kept(keep_ptr, row, keep_strides[1], row < length)
        total += kept
        before += tl.where(row < first, kept, 0)
    count = tl.sum(total, 0)
    row = first + tl.arange(0, CHUNK)
    inside = row < length
    kept = _kept(keep_ptr, row, keep_strides[1], inside)
    kept_before = tl.sum(before, 0) + tl.cumsum(kept, 0) - kept
    place = tl.where(kept != 0, kept_before, count + row - kept_before)
    tl.store(rows_ptr + image * length + place, row, mask=inside)
    if chunk == 0:
        tl.store(counts_ptr + image, count)


def kept_rows(keep: Tensor) -> tuple[Tensor, Tensor]:
    batch_size, length = keep.shape
    rows = keep.new_empty(keep.shape, dtype=torch.int32)
    if rows.numel() == 0:
        return rows, keep.new_zeros(batch_size, dtype=torch.int32)
    counts = keep.new_empty(batch_size, dtype=torch.int32)
    with on_device_of(keep):
        kept_rows_kernel[(batch_size * ceil_div(length, CHUNK),)](
            rows, counts, keep.view(torch.uint8), keep.stride(), length, COUNT=COUNT, CHUNK=CHUNK, **OPTIONS
        )
    return rows, counts


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, counts: Tensor, all_keys: bool, scale: float | None, save_lse: bool
) -> tuple[Tensor, Tensor]:
    batch_size, num_heads, length, head_dim = q.shape
    out = rows_first(q)
    lse = q.new_empty(q.shape[:3] if save_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    scale = head_dim**-0.5 if scale is None else scale
    where = Rows(batch_size, length, rows, counts, not all_keys)
    with on_device_of(q):
        launch_forward(out, lse if save_lse else None, *map(_operand, (q, k, v)), where, num_heads, scale)
    return out, lse


def masked_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    counts: Tensor,
    all_keys: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_heads, length, head_dim = q.shape
    grads = rows_first(q), rows_first(q), rows_first(q)
    if q.numel() == 0:
        return grads
    if lse.numel() == 0:  # the registered op was called without save_lse
        lse = masked_attention(q, k, v, rows, counts, all_keys, scale, True)[1]
    scale = head_dim**-0.5 if scale is None else scale
    where = Rows(batch_size, length, rows, counts, not all_keys)
    with on_device_of(q):
        launch_backward(grads, *map(_operand, (q, k, v, out, grad)), None, lse, where, num_heads, scale)
    return grads


def _operand(x: Tensor) -> Operand:
    return operand(x, row=2, head=1, image=0)
