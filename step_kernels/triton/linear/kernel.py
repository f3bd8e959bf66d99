"""Linear layer with its epilogue on the live rows: act(x @ weight.T + bias) * gamma + residual, by a persistent kernel.

Equivalent PyTorch: ``reference/linear.py``. Grid: as many programs as the GPU holds at a time; the live count, read on the device, tells how
many tiles they share out, so a larger capacity costs nothing. Tiles go down GROUP rows of tiles before they go right, so that programs
that run together read the same x and weight from the L2 cache. The loop over tiles is flattened into the one over inputs where
Triton pipelines that: the next tile's loads run during this one's epilogue. Bytes: x, weight, residual and output once each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import live_count
from ..common.matrix import add_dot
from .epilogue import finish


@triton.jit
def tile_position(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of the tile ``index``, in groups of GROUP row tiles."""
    in_group = GROUP * column_tiles
    first = index // in_group * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + index % in_group % rows, index % in_group // rows


@triton.jit
def load_inputs(
    source, strides, first_row, last_row, first_input, inputs,
    ROWS: tl.constexpr, INPUTS: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[ROWS, INPUTS] of a matrix, zero past its last input; rows past ``last_row`` are some other row, whose results nobody stores."""
    if TMA:
        return source.load([first_row, first_input])
    else:
        row = tl.minimum(first_row + tl.arange(0, ROWS), last_row).to(tl.int64)
        column = first_input + tl.arange(0, INPUTS)
        address = source + row[:, None] * strides[0] + column.to(tl.int64)[None, :] * strides[1]
        if EVEN:
            return tl.load(address)
        else:
            return tl.load(address, mask=(column < inputs)[None, :], other=0.0)


@triton.jit
def store_tile(out_ptr, value, row, column, last_row, outputs):
    """A tile's rows before ``last_row``, into the contiguous output. In the order of ``store_block`` it takes up to 28 registers more."""
    mask = (row < last_row)[:, None] & (column < outputs)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * outputs + column[None, :], value, mask=mask)


@triton.jit
def zero_tail(out_ptr, live, capacity, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the rows past the live count."""
    column_tiles = tl.cdiv(outputs, COLUMNS)
    zero = tl.zeros([ROWS, COLUMNS], out_ptr.dtype.element_ty)
    for index in range(tl.program_id(0), tl.cdiv(capacity - live, ROWS) * column_tiles, tl.num_programs(0)):
        row = live + tl.cast(index // column_tiles, tl.int64) * ROWS + tl.arange(0, ROWS)
        column = index % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
        store_tile(out_ptr, zero, row, column, capacity, outputs)


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def linear_kernel(
    out_ptr, x, weight, bias_ptr, gamma_ptr, residual, cu_seqlens_ptr,
    x_strides, weight_strides, vector_strides, residual_stride, batch_size, capacity, inputs, outputs,
    ACTIVATION: tl.constexpr, FILL_TAIL: tl.constexpr, TMA: tl.constexpr, TMA_RESIDUAL: tl.constexpr,
    FLATTEN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out [capacity, outputs]. TMA: x and weight are descriptors, TMA_RESIDUAL: so is the residual."""
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    row_tiles = tl.cdiv(live, ROWS)
    column_tiles = tl.cdiv(outputs, COLUMNS)
    WIDE: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    WIDTH: tl.constexpr = COLUMNS // PARTS
    for index in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = tile_position(index, row_tiles, column_tiles, GROUP)
        first_row = row_tile * ROWS
        first_column = column_tile * COLUMNS
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(0, tl.cdiv(inputs, INPUTS)):
            a = load_inputs(x, x_strides, first_row, live - 1, step * INPUTS, inputs, ROWS, INPUTS, TMA, EVEN)
            b = load_inputs(
                weight, weight_strides, first_column, outputs - 1, step * INPUTS, inputs, COLUMNS, INPUTS, TMA, EVEN
            )
            sums = add_dot(sums, a, b.T, PRECISION)
        # Half a tile at a time: the whole one's epilogue spills.
        halves = tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, WIDTH]), (0, 2, 1))) if PARTS == 2 else (sums,)
        for part in tl.static_range(PARTS):
            column = first_column + part * WIDTH + tl.arange(0, WIDTH)
            value = finish(
                halves[part], bias_ptr, gamma_ptr, residual, vector_strides, residual_stride,
                first_row, first_column + part * WIDTH, live, outputs, ACTIVATION, TMA_RESIDUAL, WIDE, ROWS, WIDTH,
            )  # fmt: skip
            row = first_row + tl.arange(0, ROWS)
            store_tile(out_ptr, value.to(out_ptr.dtype.element_ty), row, column, live, outputs)
    if FILL_TAIL:
        zero_tail(out_ptr, live, capacity, outputs, ROWS, COLUMNS)
