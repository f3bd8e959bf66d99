"""LayerNorm backward: one kernel for x, two for weight and bias, no atomics.

With n the normalised row and g = grad * weight: grad_x = (g - mean(g) - n mean(g n)) / sqrt(variance + eps), grad_weight = sum(grad n),
grad_bias = sum(grad) over the live rows. The first kernel computes the statistics anew and leaves them, two numbers a row, to the second,
whose programs sum CHUNKS shares of the rows; the third sums these. Shares and their order depend on shapes alone, so results repeat bit
for bit on any GPU. Bytes: x and grad twice (once without weight and bias), grad_x once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import live_count
from ..common.matrix import load_block, load_vector, store_block, zero_block
from .forward import statistics


@triton.jit
def _weighted_grad(grad_ptr, strides, weight_ptr, weight_stride, row, column, inside, width):
    """grad * weight, a block."""
    grad = load_block(grad_ptr, strides, row, column, inside, width)
    if weight_ptr is not None:
        grad *= load_vector(weight_ptr, weight_stride, column, width)
    return grad


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def layer_norm_backward_kernel(
    grad_x_ptr, statistics_ptr, grad_ptr, x_ptr, weight_ptr, cu_seqlens_ptr,
    grad_strides, x_strides, weight_stride, eps, batch_size, capacity, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """grad_x [capacity, width], zeros past the live count; statistics [2, capacity]: mean, 1 / sqrt(variance + eps). Either may be None."""
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    count = tl.cast(width, tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(capacity, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < live
        if block * ROWS < live:
            mean, scale, centred = statistics(x_ptr, x_strides, row, inside, width, eps, ROWS, COLUMNS, WHOLE)
            if statistics_ptr is not None:
                tl.store(statistics_ptr + row, mean, mask=inside)
                tl.store(statistics_ptr + capacity + row, scale, mask=inside)
            if grad_x_ptr is not None:
                column = tl.arange(0, COLUMNS)
                normed = centred * scale[:, None]
                grad = _weighted_grad(grad_ptr, grad_strides, weight_ptr, weight_stride, row, column, inside, width)
                total = grad
                product = grad * normed
                if not WHOLE:
                    for start in range(COLUMNS, width, COLUMNS):
                        column = start + tl.arange(0, COLUMNS)
                        x = load_block(x_ptr, x_strides, row, column, inside, width)
                        more = _weighted_grad(
                            grad_ptr, grad_strides, weight_ptr, weight_stride, row, column, inside, width
                        )
                        total += more
                        # Past the row's end the gradient is zero, and the centred value finite where the row is.
                        product += more * ((x - mean[:, None]) * scale[:, None])
                total_mean = tl.div_rn(tl.sum(total, 1), count)[:, None]
                product_mean = tl.div_rn(tl.sum(product, 1), count)[:, None]
                column = tl.arange(0, COLUMNS)
                value = (grad - total_mean - normed * product_mean) * scale[:, None]
                store_block(grad_x_ptr, value, row, column, inside, width)
                if not WHOLE:
                    for start in range(COLUMNS, width, COLUMNS):
                        column = start + tl.arange(0, COLUMNS)
                        x = load_block(x_ptr, x_strides, row, column, inside, width)
                        more = _weighted_grad(
                            grad_ptr, grad_strides, weight_ptr, weight_stride, row, column, inside, width
                        )
                        value = more - total_mean - (x - mean[:, None]) * scale[:, None] * product_mean
                        store_block(grad_x_ptr, value * scale[:, None], row, column, inside, width)
        if grad_x_ptr is not None:
            zero_block(grad_x_ptr, row, (row >= live) & (row < capacity), width, COLUMNS)


@triton.jit
def _sum_rows(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of columns, [COLUMNS], by fours of rows first: a shorter chain of roundings wherever ``tl.sum`` adds one row at a time."""
    return tl.sum(tl.sum(tl.reshape(x, [ROWS // 4, 4, COLUMNS]), 1), 0)


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def layer_norm_parameters_kernel(
    partial_ptr, statistics_ptr, grad_ptr, x_ptr, cu_seqlens_ptr,
    grad_strides, x_strides, batch_size, capacity, width,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [CHUNKS, 2, width]: sums of grad * normed and of grad over each share of the rows. Grid: cdiv(width, COLUMNS) * CHUNKS."""
    chunk = tl.program_id(0) % CHUNKS
    column = tl.program_id(0) // CHUNKS * COLUMNS + tl.arange(0, COLUMNS)
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(chunk, tl.cdiv(live, ROWS), CHUNKS):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < live
        mean = tl.load(statistics_ptr + row, mask=inside, other=0.0)
        scale = tl.load(statistics_ptr + capacity + row, mask=inside, other=0.0)
        grad = load_block(grad_ptr, grad_strides, row, column, inside, width)
        x = load_block(x_ptr, x_strides, row, column, inside, width)
        weight_sum += grad * ((x - mean[:, None]) * scale[:, None])
        bias_sum += grad
    address = partial_ptr + chunk.to(tl.int64) * 2 * width + column
    tl.store(address, _sum_rows(weight_sum, ROWS, COLUMNS), mask=column < width)
    tl.store(address + width, _sum_rows(bias_sum, ROWS, COLUMNS), mask=column < width)


@triton.jit
def sum_chunks_kernel(grad_weight_ptr, grad_bias_ptr, partial_ptr, width, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    """grad_weight and grad_bias [width], either of which may be None. Grid: cdiv(width, COLUMNS)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    address = partial_ptr + tl.arange(0, CHUNKS).to(tl.int64)[:, None] * 2 * width + column[None, :]
    if grad_weight_ptr is not None:
        total = tl.sum(tl.load(address, mask=inside[None, :], other=0.0), 0)
        tl.store(grad_weight_ptr + column, total.to(grad_weight_ptr.dtype.element_ty), mask=inside)
    if grad_bias_ptr is not None:
        total = tl.sum(tl.load(address + width, mask=inside[None, :], other=0.0), 0)
        tl.store(grad_bias_ptr + column, total.to(grad_bias_ptr.dtype.element_ty), mask=inside)
