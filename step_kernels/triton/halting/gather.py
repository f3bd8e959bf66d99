"""The survivors' tokens, packed, and the gradient of that: one kernel each, every output row written once.

Equivalent PyTorch: ``tokens[rows]``; backward ``zeros.index_copy(0, rows, grad)``. Surviving rows ascend, so the gradient is gathered too: a
binary search tells each input row where it went, or that it halted, and no fill comes first.
Bytes: each surviving row read once, each output row written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import live_count

# Not measured on a GPU yet. Elements of one program and its warps, the first row where `tune` has measured none: two to four 16-byte loads in
# flight per thread.
GATHER_TILES = (4096, 4), (2048, 4), (2048, 2), (8192, 4)
GATHER_COLUMNS = 1024
GATHER_ROWS = 128  # of narrow tokens: the search holds a few 64-bit numbers per row


@triton.jit
def _copy_rows(
    out_ptr, x_ptr, out_row, x_row, found, stored, out_stride, row_stride, column_stride, width,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[out_row] = x[x_row] where ``found``, zeros in other rows that are ``stored``; all [ROWS]."""
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < width)[None, :]
        address = x_ptr + x_row[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
        value = tl.load(address, mask=found[:, None] & inside, other=0.0)
        tl.store(out_ptr + out_row[:, None] * out_stride + column[None, :], value, mask=stored[:, None] & inside)


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def gather_kernel(
    out_ptr, tokens_ptr, rows_ptr, cu_seqlens_ptr, token_stride, batch_size, capacity, width,
    FILL_TAIL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [capacity, width]: the tokens that ``rows`` names. Grid: cdiv(capacity, ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    stored = row < capacity
    found = row < live_count(cu_seqlens_ptr, batch_size, capacity)
    if not FILL_TAIL:
        stored = found
    copied = tl.max(stored.to(tl.int32), 0) * width  # nothing in a program of an undefined tail
    source = tl.load(rows_ptr + row, mask=found, other=0).to(tl.int64)
    _copy_rows(out_ptr, tokens_ptr, row, source, found, stored, width, token_stride, 1, copied, COLUMNS)


@triton.jit(do_not_specialize=["batch_size", "survivors", "capacity"])
def gather_backward_kernel(
    out_ptr, grad_ptr, rows_ptr, cu_seqlens_ptr, grad_stride, grad_column_stride, batch_size, survivors, capacity, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [capacity, width]: each survivor's gradient, zero for the others. Grid: cdiv(capacity, ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = live_count(cu_seqlens_ptr, batch_size, survivors)
    stored = row < capacity
    low = tl.zeros([ROWS], tl.int32)
    high = low + live
    span = tl.max(high, 0)
    # Halves the range until it is empty; ``low`` becomes the first entry of ``rows`` that is not below the row.
    while span > 0:
        middle = low + (high - low) // 2
        searching = stored & (low < high)
        below = tl.load(rows_ptr + middle, mask=searching, other=0) < row
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
        span = span // 2
    found = stored & (low < live)
    found = found & (tl.load(rows_ptr + low, mask=found, other=-1) == row)
    _copy_rows(
        out_ptr, grad_ptr, row, low.to(tl.int64), found, stored, width, grad_stride, grad_column_stride, width, COLUMNS
    )
