"""What follows an exit's decision: the survivors' layout, and the canvas. One launch of three kinds of programs.

Equivalent PyTorch: ``_survivors`` and the ``expand_blocks_`` of ``reference/halting.py``. Programs that pack find their place by summing the counts
that the decision left for every block of rows before them, so neither a scan kernel nor an order between programs is needed. Programs
that paint take a few cells each, whatever the blocks' sides, and search their tokens. ``gather.py`` moves the survivors' tokens.
Bytes: cells twice, halted once, rows once; on the canvas each cell of a halted token once. The counts, 4 bytes per 16 or more rows, are
read from cache by each packing program: little up to some hundred thousand rows, but it grows with the square (1 GB for a million).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.cells import multiple, token_covering
from ..common.live_rows import live_count, within
from .decision import threshold_of

# Not measured on a GPU yet. The first row runs where `tune` has measured none; the others are its candidates.
# Rows of one packing program: each sums all counts, so fewer rows would read them more often. Cells of one painting program, whose search for
# their tokens is a chain of dependent loads that only many programs hide. Warps of either.
COMPACT_ROWS = (256, 16, 4), (256, 8, 4), (128, 8, 2), (256, 32, 4)
SUM_BLOCK = 1024  # counts that one program sums at a time
PAINT_CHANNELS = 128
PAINT_LANES = 32  # threads that share a cell's channels


@triton.jit
def _sum_of_counts(counts_ptr, middle, end, BLOCK: tl.constexpr):
    """Survivors counted in blocks of rows before ``middle``, and before ``end``."""
    below = 0
    total = 0
    for start in range(0, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + index, mask=index < end, other=0)
        below += tl.sum(tl.where(index < middle, count, 0), 0)
        total += tl.sum(count, 0)
    return below, total


@triton.jit
def _pack(
    new_cells_ptr, rows_ptr, halted_ptr, counts_ptr, cells_ptr, chunk, live, capacity,
    COUNTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The survivors among ROWS rows go behind all earlier ones; of the same rows of the outputs, those in the tail become zero."""
    row = chunk.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    survives = (row < live) & (tl.load(halted_ptr + row, mask=row < live, other=1) == 0)
    # Past the live rows everything is tail, however many survive.
    counted = tl.where(chunk * ROWS < live, tl.cdiv(live, COUNTED), 0)
    before, total = _sum_of_counts(counts_ptr, chunk * (ROWS // COUNTED), counted, BLOCK)
    place = (before + tl.cumsum(survives.to(tl.int32), 0) - 1).to(tl.int64)
    column = tl.arange(0, 4)[None, :]
    cells = tl.load(cells_ptr + row[:, None] * 4 + column, mask=survives[:, None], other=0)  # [ROWS, 4]
    tl.store(rows_ptr + place, row.to(tl.int32), mask=survives)
    tl.store(new_cells_ptr + place[:, None] * 4 + column, cells, mask=survives[:, None])
    tail = (row >= total) & (row < capacity)
    tl.store(rows_ptr + row, tl.zeros([ROWS], tl.int32), mask=tail)
    tl.store(new_cells_ptr + row[:, None] * 4 + column, tl.zeros_like(cells), mask=tail[:, None])


@triton.jit
def _start_image(
    new_cu_seqlens_ptr, halted_ptr, counts_ptr, cu_seqlens_ptr, image, live, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Where an image's survivors start: the survivors of all rows before it."""
    end = within(tl.load(cu_seqlens_ptr + image), live)
    whole = end // COUNTED
    _, total = _sum_of_counts(counts_ptr, 0, whole, BLOCK)
    row = whole.to(tl.int64) * COUNTED + tl.arange(0, COUNTED)
    survives = (row < end) & (tl.load(halted_ptr + row, mask=row < end, other=1) == 0)
    tl.store(new_cu_seqlens_ptr + image, total + tl.sum(survives.to(tl.int32), 0))


@triton.jit
def _paint(
    canvas_ptr, values_ptr, halted_ptr, confidence_ptr, labels_ptr, threshold, cu_seqlens_ptr, cells_ptr,
    canvas_strides, value_stride, program, capacity, rows, cols, channels,
    NUM_SIDES: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """CELLS cells get the values of the tokens that cover them and halted or were confident.

    Without ``values_ptr`` the values lie in the canvas already, at the top-left cell of each block.
    """
    cell_blocks = tl.cdiv(rows * cols, CELLS)
    image = program // cell_blocks
    cell = program % cell_blocks * CELLS + tl.arange(0, CELLS)
    row, col = cell // cols, cell % cols
    token = token_covering(cu_seqlens_ptr, cells_ptr, image, row, col, row < rows, capacity, NUM_SIDES)
    covered = token >= 0
    written = tl.load(labels_ptr + token, mask=covered, other=-1) >= 0
    written &= tl.load(confidence_ptr + token, mask=covered, other=0.0) > threshold
    written |= tl.load(halted_ptr + token, mask=covered, other=0) != 0
    row, col = row.to(tl.int64), col.to(tl.int64)
    start = canvas_ptr + image.to(tl.int64) * multiple(canvas_strides[0], VECTOR)
    row_stride, col_stride = multiple(canvas_strides[2], VECTOR), multiple(canvas_strides[3], VECTOR)
    place = row * row_stride + col * col_stride
    if values_ptr is None:
        side = tl.load(cells_ptr + token.to(tl.int64) * 4 + 3, mask=written, other=1)
        down, right = row % side, col % side
        written &= (down > 0) | (right > 0)
        source = start + ((row - down) * row_stride + (col - right) * col_stride)
        channel_stride = canvas_strides[1]
    else:
        source = values_ptr + token.to(tl.int64) * multiple(value_stride, VECTOR)
        channel_stride = 1
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)
        mask = written[:, None] & (channel < multiple(channels, VECTOR))[None, :]
        channel = channel.to(tl.int64)[None, :]
        value = tl.load(source[:, None] + channel * channel_stride, mask=mask).to(canvas_ptr.dtype.element_ty)
        tl.store(start + (place[:, None] + channel * canvas_strides[1]), value, mask=mask)


@triton.jit(do_not_specialize=["batch_size", "capacity", "rows", "cols"])
def compact_kernel(
    new_cu_seqlens_ptr, new_cells_ptr, rows_ptr, canvas_ptr,
    values_ptr, halted_ptr, counts_ptr, confidence_ptr, labels_ptr, threshold, cu_seqlens_ptr, cells_ptr,
    canvas_strides, value_stride, batch_size, capacity, rows, cols, channels,
    DEVICE_THRESHOLD: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    NUM_SIDES: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The survivors' layout and rows; the canvas, if there is one. ``counts`` holds the survivors of every COUNTED rows.

    Grid: cdiv(capacity, ROWS) programs pack, B + 1 find where images start, and B * cdiv(rows * cols, CELLS) paint the canvas.
    """
    program = tl.program_id(0)
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    packing = tl.cdiv(capacity, ROWS)
    painter = program - packing - batch_size - 1
    if program < packing:
        _pack(new_cells_ptr, rows_ptr, halted_ptr, counts_ptr, cells_ptr, program, live, capacity, COUNTED, ROWS, BLOCK)
    elif painter < 0:
        image = program - packing
        _start_image(new_cu_seqlens_ptr, halted_ptr, counts_ptr, cu_seqlens_ptr, image, live, COUNTED, BLOCK)
    elif canvas_ptr is not None:
        _paint(
            canvas_ptr, values_ptr, halted_ptr, confidence_ptr, labels_ptr, threshold_of(threshold, DEVICE_THRESHOLD),
            cu_seqlens_ptr, cells_ptr, canvas_strides, value_stride, painter, capacity, rows, cols, channels,
            NUM_SIDES, CELLS, CHANNELS, VECTOR,
        )  # fmt: skip
