"""Layouts from scores or from a map of sides: three kernels, no sort, no atomics, no host sync.

Equivalent PyTorch: ``reference/layout.py``. The side of a cell is that of the coarsest block that is taken over it, which depends on no
other cell, so each kernel decides anew and no decision is stored. Tokens are counted per chunk of cells (``count_kernel``), summed over an
image's chunks (``scan_kernel``) and written behind all that precede them (``write_kernel``).
Bytes: the scores twice, cells [capacity, 4] once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..validation import validate_sides
from .common.cells import expand_blocks_
from .common.launch import OPTIONS, ceil_div, on_device_of

CHUNK = 512  # cells of one program: a 64 x 64 grid gives work to eight multiprocessors per image; 1024 spilled on sm_80 to sm_89
NUM_WARPS = 4
SCAN_BLOCK = 1024  # counts that one program sums at a time


@triton.jit
def _sides_of_cells(
    scores, strides, thresholds, image, row, col, inside, rows, cols,
    SIDES: tl.constexpr, FROM_SIDES: tl.constexpr, DEVICE_THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """Side of the block that covers each cell, int32 [CHUNK]; 0 outside the grid and where no token covers it."""
    if FROM_SIDES:
        address = image * strides[0][0] + row.to(tl.int64) * strides[0][1] + col.to(tl.int64) * strides[0][2]
        side = tl.load(scores[0] + address, mask=inside, other=0).to(tl.int32)
    else:
        side = tl.where(inside, 1, 0)
        # SIDES ascend: a coarser block that is taken overrules the finer ones below it.
        for i in tl.static_range(len(SIDES)):
            block_row = row // SIDES[i]
            block_col = col // SIDES[i]
            whole = inside & (block_row < rows // SIDES[i]) & (block_col < cols // SIDES[i])
            address = image * strides[i][0]
            address += block_row.to(tl.int64) * strides[i][1] + block_col.to(tl.int64) * strides[i][2]
            score = tl.load(scores[i] + address, mask=whole, other=0.0).to(tl.float32)
            if DEVICE_THRESHOLDS:
                threshold = tl.load(thresholds[i]).to(tl.float32)
            else:
                threshold = tl.cast(thresholds[i], tl.float32)
            side = tl.where(whole & (score > threshold), SIDES[i], side)  # NaN exceeds nothing
    return side


@triton.jit
def _first_cells(
    scores, strides, thresholds, image, chunk, rows, cols,
    SIDES: tl.constexpr, FROM_SIDES: tl.constexpr, DEVICE_THRESHOLDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of a chunk of cells in raster order: row, column, side, and 1 where a block starts. int32 [CHUNK] each."""
    cell = chunk * CHUNK + tl.arange(0, CHUNK)
    row = cell // cols
    col = cell % cols
    side = _sides_of_cells(
        scores, strides, thresholds, image, row, col, row < rows, rows, cols, SIDES, FROM_SIDES, DEVICE_THRESHOLDS
    )
    step = tl.maximum(side, 1)
    starts = (side > 0) & (row % step == 0) & (col % step == 0)
    return row, col, side, starts.to(tl.int32)


# Not of the grid's columns and strides: a map of sides whose rows are multiples of 16 is loaded 16 bytes at a time.
@triton.jit(do_not_specialize=["rows", "num_chunks"])
def count_kernel(
    counts_ptr, scores, strides, thresholds, rows, cols, num_chunks,
    SIDES: tl.constexpr, FROM_SIDES: tl.constexpr, DEVICE_THRESHOLDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """counts [B, num_chunks]: blocks that start in each chunk. Grid: B * num_chunks."""
    program = tl.program_id(0)
    image = (program // num_chunks).to(tl.int64)
    _, _, _, starts = _first_cells(
        scores, strides, thresholds, image, program % num_chunks, rows, cols,
        SIDES, FROM_SIDES, DEVICE_THRESHOLDS, CHUNK,
    )  # fmt: skip
    tl.store(counts_ptr + program, tl.sum(starts, 0))


@triton.jit(do_not_specialize=["before_ptr", "totals_ptr", "num_chunks"])
def scan_kernel(before_ptr, totals_ptr, counts_ptr, num_chunks, BLOCK: tl.constexpr):
    """before [B, num_chunks]: blocks of the image in earlier chunks; totals [B]. Grid: B."""
    image = tl.program_id(0)
    base = image.to(tl.int64) * num_chunks
    total = 0
    for start in range(0, num_chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + base + chunk, mask=chunk < num_chunks, other=0)
        tl.store(before_ptr + base + chunk, total + tl.cumsum(count, 0) - count, mask=chunk < num_chunks)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + image, total)


@triton.jit
def _sum_of_totals(totals_ptr, end, BLOCK: tl.constexpr):
    """Blocks of the images before ``end``."""
    total = 0
    for start in range(0, end, BLOCK):
        image = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(totals_ptr + image, mask=image < end, other=0), 0)
    return total


@triton.jit(
    do_not_specialize=["before_ptr", "totals_ptr", "rows", "num_chunks", "batch_size", "num_prefix", "capacity"]
)
def write_kernel(
    cu_seqlens_ptr, cells_ptr, before_ptr, totals_ptr, scores, strides, thresholds,
    rows, cols, num_chunks, batch_size, num_prefix, capacity,
    SIDES: tl.constexpr, FROM_SIDES: tl.constexpr, DEVICE_THRESHOLDS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """cells and cu_seqlens; each program also zeroes its share of the tail. Grid: B * num_chunks."""
    program = tl.program_id(0)
    image = program // num_chunks
    chunk = program % num_chunks
    start = _sum_of_totals(totals_ptr, image, BLOCK) + image * num_prefix  # the image's first row
    row, col, side, starts = _first_cells(
        scores, strides, thresholds, image.to(tl.int64), chunk, rows, cols,
        SIDES, FROM_SIDES, DEVICE_THRESHOLDS, CHUNK,
    )  # fmt: skip
    place = start + num_prefix + tl.load(before_ptr + program) + tl.cumsum(starts, 0) - 1
    address = cells_ptr + place.to(tl.int64) * 4
    tl.store(address, tl.zeros_like(row) + image, mask=starts > 0)
    tl.store(address + 1, row, mask=starts > 0)
    tl.store(address + 2, col, mask=starts > 0)
    tl.store(address + 3, side, mask=starts > 0)
    if chunk == 0:
        tl.store(cu_seqlens_ptr + image + 1, start + num_prefix + tl.load(totals_ptr + image))
        if image == 0:
            tl.store(cu_seqlens_ptr, 0)
        for first in range(0, num_prefix, BLOCK):
            _store_rows(cells_ptr, start + first + tl.arange(0, BLOCK), start, start + num_prefix, image)
    live = _sum_of_totals(totals_ptr, batch_size, BLOCK) + batch_size * num_prefix
    share = tl.cdiv(capacity, batch_size * num_chunks)
    begin = program.to(tl.int64) * share  # the last program's share may end past 2^31
    for first in range(0, share, BLOCK):
        tail = begin + first + tl.arange(0, BLOCK)
        _store_rows(cells_ptr, tail, live, tl.minimum(begin + share, capacity), 0)


@triton.jit
def _store_rows(cells_ptr, row, start, stop, image):
    """[image, 0, 0, 0] in the rows from start to stop."""
    mask = (row >= start) & (row < stop)
    address = cells_ptr + row.to(tl.int64) * 4
    zero = tl.zeros_like(row)
    tl.store(address, zero + image, mask=mask)
    tl.store(address + 1, zero, mask=mask)
    tl.store(address + 2, zero, mask=mask)
    tl.store(address + 3, zero, mask=mask)


def resolve_layout(
    scores: list[Tensor],
    sides: list[int],
    thresholds: list[float],
    threshold_tensors: list[Tensor],
    rows: int,
    cols: int,
    num_prefix: int,
) -> tuple[Tensor, Tensor]:
    # A side that fits the grid nowhere has an empty map, whose pointer kernels could not take.
    order = sorted((i for i in range(len(sides)) if sides[i] <= min(rows, cols)), key=lambda i: sides[i])
    chosen = threshold_tensors if threshold_tensors else thresholds
    return _layout(
        tuple(scores[i] for i in order),
        tuple(chosen[i] for i in order),
        tuple(sides[i] for i in order),
        like=scores[0],
        grid=(rows, cols),
        num_prefix=num_prefix,
        device_thresholds=bool(threshold_tensors),
    )


def layout_from_sides(sides: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    validate_sides(sides)
    return _layout((sides,), (0.0,), (), like=sides, grid=sides.shape[1:], num_prefix=num_prefix, from_sides=True)


def layout_sides(cu_seqlens: Tensor, cells: Tensor, rows: int, cols: int) -> Tensor:
    sides = cells.new_empty(cu_seqlens.shape[0] - 1, rows, cols, 1)
    return expand_blocks_(sides, cells[:, 3:], cu_seqlens, cells, fill_zero=True).squeeze(3)


def _layout(
    scores: tuple[Tensor, ...],
    thresholds: tuple[float | Tensor, ...],
    sides: tuple[int, ...],
    *,
    like: Tensor,
    grid: tuple[int, ...],
    num_prefix: int,
    device_thresholds: bool = False,
    from_sides: bool = False,
) -> tuple[Tensor, Tensor]:
    batch_size, (rows, cols) = like.shape[0], grid
    capacity = batch_size * (num_prefix + rows * cols)
    cu_seqlens = like.new_empty(batch_size + 1, dtype=torch.int32)
    cells = like.new_empty(capacity, 4, dtype=torch.int32)
    if batch_size == 0:
        return cu_seqlens.zero_(), cells
    num_chunks = ceil_div(rows * cols, CHUNK)
    counts = like.new_empty(2 * batch_size * num_chunks + batch_size, dtype=torch.int32)
    counts, before, totals = counts.split([batch_size * num_chunks, batch_size * num_chunks, batch_size])
    strides = tuple(score.stride() for score in scores)
    decision = {
        "SIDES": sides,
        "FROM_SIDES": from_sides,
        "DEVICE_THRESHOLDS": device_thresholds,
        "CHUNK": CHUNK,
        "num_warps": NUM_WARPS,
    }
    programs = (batch_size * num_chunks,)
    with on_device_of(like):
        count_kernel[programs](counts, scores, strides, thresholds, rows, cols, num_chunks, **decision, **OPTIONS)
        scan_kernel[(batch_size,)](before, totals, counts, num_chunks, BLOCK=SCAN_BLOCK, **OPTIONS)
        write_kernel[programs](
            cu_seqlens, cells, before, totals, scores, strides, thresholds,
            rows, cols, num_chunks, batch_size, num_prefix, capacity, **decision, BLOCK=SCAN_BLOCK, **OPTIONS,
        )  # fmt: skip
    return cu_seqlens, cells
