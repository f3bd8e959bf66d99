"""LayerNorm on the live rows, forward, and what its backward shares: ((x - mean) / sqrt(variance + eps)) * weight + bias.

Equivalent PyTorch: ``reference/norm.py``. Grid: a few programs per multiprocessor, which take blocks of ROWS rows in turn up to the live
count, so a larger capacity costs nothing. Statistics in fp32 and two passes, mean then centred variance: in registers where one block of
COLUMNS holds a row (WHOLE), else over the row again, from the caches. Bytes: live rows read and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import live_count
from ..common.matrix import load_block, load_vector, store_block, zero_block


@triton.jit
def statistics(
    x_ptr, strides, row, inside, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(mean, 1 / sqrt(variance + eps), the row's first COLUMNS entries centred), [ROWS], [ROWS], [ROWS, COLUMNS]."""
    count = tl.cast(width, tl.float32)
    first = tl.arange(0, COLUMNS)
    x = load_block(x_ptr, strides, row, first, inside, width)
    if not WHOLE:
        for start in range(COLUMNS, width, COLUMNS):
            x += load_block(x_ptr, strides, row, start + first, inside, width)
    mean = tl.div_rn(tl.sum(x, 1), count)
    if not WHOLE:
        x = load_block(x_ptr, strides, row, first, inside, width)
    centred = tl.where((first < width)[None, :], x - mean[:, None], 0.0)
    squares = centred * centred
    if not WHOLE:
        for start in range(COLUMNS, width, COLUMNS):
            more = load_block(x_ptr, strides, row, start + first, inside, width) - mean[:, None]
            squares += tl.where((start + first < width)[None, :], more * more, 0.0)
    variance = tl.div_rn(tl.sum(squares, 1), count)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32))), centred


@triton.jit
def affine(normed, weight_ptr, bias_ptr, vector_strides, column, width):
    """normed * weight + bias; either may be None."""
    if weight_ptr is not None:
        normed *= load_vector(weight_ptr, vector_strides[0], column, width)
    if bias_ptr is not None:
        normed += load_vector(bias_ptr, vector_strides[1], column, width)
    return normed


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def layer_norm_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr,
    x_strides, vector_strides, eps, batch_size, capacity, width,
    FILL_TAIL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out [capacity, width]."""
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    last = live
    if FILL_TAIL:
        last = capacity
    for block in range(tl.program_id(0), tl.cdiv(last, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < live
        if block * ROWS < live:
            mean, scale, centred = statistics(x_ptr, x_strides, row, inside, width, eps, ROWS, COLUMNS, WHOLE)
            column = tl.arange(0, COLUMNS)
            value = affine(centred * scale[:, None], weight_ptr, bias_ptr, vector_strides, column, width)
            store_block(out_ptr, value, row, column, inside, width)
            if not WHOLE:
                for start in range(COLUMNS, width, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    value = (load_block(x_ptr, x_strides, row, column, inside, width) - mean[:, None]) * scale[:, None]
                    value = affine(value, weight_ptr, bias_ptr, vector_strides, column, width)
                    store_block(out_ptr, value, row, column, inside, width)
        if FILL_TAIL:
            zero_block(out_ptr, row, (row >= live) & (row < capacity), width, COLUMNS)
