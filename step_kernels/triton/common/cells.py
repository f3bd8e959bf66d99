"""Blocks of cells on a feature grid: what merging tokens, pooling positions, scattering and their gradients share. One kernel each way.

``reduce_blocks``: per token, the mean or sum over its block, each covered cell read once. ``expand_blocks_``, its adjoint, runs per cell and
finds the token that covers it, so one launch writes covered and uncovered cells alike, each once, with neither atomics nor a fill.
Equivalent PyTorch: ``reference/cells.py``. Bytes: the features once, the values once, the layout.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ...checks import MAX_SIDE
from . import tuned
from .launch import OPTIONS, ceil_div, on_device_of, power_of_2, stride
from .live_rows import rows_of
from .operands import dtype_class

# Not measured on a GPU yet. The first row runs where `tune` has measured none; the others are its candidates.
# Cells of a block read at a time: fewer make the largest blocks slow, more idle on the smallest. Channels: with less, what a program does
# for its token is done again for other channels; with twice as many fp32 spills. Warps.
REDUCE_ROWS = (4, 512, 4), (4, 256, 2), (8, 256, 4), (2, 1024, 4)
# Cells of one program: few, as the search for a cell's token is a chain of dependent loads that only many programs hide. Warps.
EXPAND_ROWS = (16, 4), (8, 4), (8, 2), (32, 8)
EXPAND_CHANNELS = 128
EXPAND_LANES = 32  # threads that share a cell's row: with more, most idle at the end of 150 channels


@triton.jit
def token_covering(cu_seqlens_ptr, cells_ptr, image, row, col, valid, capacity, NUM_SIDES: tl.constexpr):
    """Row of the live token that covers each of a block [N] of cells of one image, int32; -1 where none does.

    A block of side s that holds the cell can only start at the cell rounded down to multiples of s, and an image's tokens ascend by
    their first cell: a binary search for each of the sides 1, 2, 4, ..., 2^(NUM_SIDES - 1) (a power of two of them), all at once.
    """
    begin, end = rows_of(cu_seqlens_ptr, image, capacity)
    span = end - begin
    side = tl.full([1, NUM_SIDES], 1, tl.int32) << tl.arange(0, NUM_SIDES)[None, :]
    first_row = row[:, None] - row[:, None] % side
    first_col = col[:, None] - col[:, None] % side
    token = tl.zeros_like(first_row) + begin
    here = valid[:, None] & (token < end)
    # Towards the last token that starts at that cell or before it. Prefix tokens read [image, 0, 0, 0]: before any block.
    while span > 1:
        half = span // 2
        address = cells_ptr + (token + half).to(tl.int64) * 4
        token_row, token_col = tl.load(address + 1), tl.load(address + 2)
        after = (token_row > first_row) | ((token_row == first_row) & (token_col > first_col))
        token = tl.where(after, token, token + half)
        span -= half
    token_row, token_col, token_side = _cell(cells_ptr, token, here)
    match = here & (token_row == first_row) & (token_col == first_col) & (token_side == side)
    return tl.max(tl.where(match, token, -1), 1)


@triton.jit
def _cell(cells_ptr, token, mask):
    """Row, column and side of tokens; zeros where masked off."""
    address = cells_ptr + token.to(tl.int64) * 4
    row = tl.load(address + 1, mask=mask, other=0)
    col = tl.load(address + 2, mask=mask, other=0)
    side = tl.load(address + 3, mask=mask, other=0)
    return row, col, side


@triton.jit(do_not_specialize=["batch_size", "num_prefix"])
def reduce_blocks_kernel(
    out_ptr, features_ptr, where_ptr, prefix_ptr, addend_ptr, cu_seqlens_ptr, cells_ptr,
    image_stride, row_stride, col_stride, channel_stride, prefix_stride, prefix_column_stride,
    addend_stride, where_stride, batch_size, num_prefix, width,
    MEAN: tl.constexpr, BILINEAR: tl.constexpr, HAS_FEATURES: tl.constexpr, HAS_WHERE: tl.constexpr,
    HAS_PREFIX: tl.constexpr, HAS_ADDEND: tl.constexpr, FILL_TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [capacity, width]: mean or sum of features over each token's block, plus addend; prefix rows from prefix; else zeros.

    Grid: capacity * cdiv(width, BLOCK_C), channels fastest.
    """
    channel_blocks = tl.cdiv(width, BLOCK_C)
    token = tl.program_id(0) // channel_blocks
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_width = channel < width
    out = out_ptr + token.to(tl.int64) * width + channel
    if token >= tl.load(cu_seqlens_ptr + batch_size):
        if FILL_TAIL:
            tl.store(out, tl.zeros([BLOCK_C], out_ptr.dtype.element_ty), mask=in_width)
        return
    cell = cells_ptr + token.to(tl.int64) * 4
    image, row, col, side = tl.load(cell), tl.load(cell + 1), tl.load(cell + 2), tl.load(cell + 3)
    # Conditions on the token enter masks as bounds on channels: Triton's interpreter cannot broadcast a scalar condition.
    selected = side > 0
    if HAS_WHERE:
        selected = selected & (tl.load(where_ptr + token.to(tl.int64) * where_stride) != 0)
    total = tl.zeros([BLOCK_C], tl.float32)
    if HAS_FEATURES:
        taken = side
        if BILINEAR:  # the central 2 x 2 cells
            taken = tl.minimum(side, 2)
            row += (side - taken) // 2
            col += (side - taken) // 2
        start = features_ptr + image.to(tl.int64) * image_stride
        start += row.to(tl.int64) * row_stride + col.to(tl.int64) * col_stride
        count = tl.where(selected, taken * taken, 0)
        total = _sum_of_cells(
            start, count, tl.maximum(taken, 1), row_stride, col_stride, channel_stride, channel, in_width,
            BLOCK_K, BLOCK_C,
        )  # fmt: skip
        if MEAN:
            total *= tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32))  # exact: a power of two
    if HAS_ADDEND:
        address = addend_ptr + token.to(tl.int64) * addend_stride + channel
        total += tl.load(address, mask=channel < tl.where(selected, width, 0), other=0.0).to(tl.float32)
    if HAS_PREFIX:
        position = token - tl.load(cu_seqlens_ptr + image)
        taken = (side == 0) & (position >= 0) & (position < num_prefix)  # whatever stands in cu_seqlens
        address = prefix_ptr + position.to(tl.int64) * prefix_stride
        address += channel.to(tl.int64) * prefix_column_stride
        total += tl.load(address, mask=channel < tl.where(taken, width, 0), other=0.0).to(tl.float32)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_width)


@triton.jit
def _sum_of_cells(
    start, count, side, row_stride, col_stride, channel_stride, channel, in_width,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over the ``count`` cells of a block: BLOCK_K partial sums, then those. One sum alone loses bits on large blocks."""
    partial = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    # A power of two's exponent, since to divide by it would cost as many instructions as all else.
    shift = (side.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    for first in range(0, count, BLOCK_K):
        cell = first + tl.arange(0, BLOCK_K)
        address = (cell >> shift).to(tl.int64) * row_stride + (cell & (side - 1)).to(tl.int64) * col_stride
        address = start + address[:, None] + channel.to(tl.int64)[None, :] * channel_stride
        partial += tl.load(address, mask=(cell < count)[:, None] & in_width[None, :], other=0.0).to(tl.float32)
    return tl.sum(partial, 0)


@triton.jit(do_not_specialize=["capacity"])  # cells of one row share their addresses where columns are a multiple of 16
def expand_blocks_kernel(
    features_ptr, values_ptr, where_ptr, cu_seqlens_ptr, cells_ptr,
    image_stride, row_stride, col_stride, channel_stride, value_stride, value_channel_stride, where_stride,
    capacity, rows, cols, width,
    MEAN: tl.constexpr, BILINEAR: tl.constexpr, HAS_WHERE: tl.constexpr, FILL_ZERO: tl.constexpr, VECTOR: tl.constexpr,
    NUM_SIDES: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """features [B, rows, cols, width]: each cell gets the values of the selected token that covers it, or zero (FILL_ZERO), or stays.

    Grid: B * cdiv(rows * cols, BLOCK_CELLS). Every cell is written at most once, by one program.
    """
    cell_blocks = tl.cdiv(rows * cols, BLOCK_CELLS)
    image = tl.program_id(0) // cell_blocks
    cell = (tl.program_id(0) % cell_blocks) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    row = cell // cols
    col = cell % cols
    inside = row < rows
    token = token_covering(cu_seqlens_ptr, cells_ptr, image, row, col, inside, capacity, NUM_SIDES)
    covered = token >= 0
    if HAS_WHERE:
        covered = covered & (tl.load(where_ptr + token.to(tl.int64) * where_stride, mask=covered, other=0) != 0)
    token = tl.where(covered, token, 0).to(tl.int64)
    side = tl.load(cells_ptr + token * 4 + 3, mask=covered, other=1)
    if BILINEAR:  # only the central 2 x 2 cells of a block were read
        covered = covered & (central(row, side) & central(col, side))
        side = tl.minimum(side, 2)
    # Exact: a power of two.
    inverse = tl.div_rn(tl.full([BLOCK_CELLS], 1.0, tl.float32), (side * side).to(tl.float32))
    written = inside
    if not FILL_ZERO:
        written = covered
    place = image.to(tl.int64) * multiple(image_stride, VECTOR) + row.to(tl.int64) * multiple(row_stride, VECTOR)
    place += col.to(tl.int64) * multiple(col_stride, VECTOR)
    source = token * multiple(value_stride, VECTOR)
    for first in range(0, width, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        in_width = (channel < multiple(width, VECTOR))[None, :]
        address = source[:, None] + channel.to(tl.int64)[None, :] * value_channel_stride
        value = tl.load(values_ptr + address, mask=covered[:, None] & in_width, other=0)
        if MEAN:
            value = value.to(tl.float32) * inverse[:, None]
        address = place[:, None] + channel.to(tl.int64)[None, :] * channel_stride
        tl.store(features_ptr + address, value.to(features_ptr.dtype.element_ty), mask=written[:, None] & in_width)


@triton.jit
def multiple(number, VECTOR: tl.constexpr):
    """The number, which is a multiple of VECTOR: so written that the compiler knows, and widens loads and stores."""
    return number // VECTOR * VECTOR


@triton.jit
def central(position, side):
    """Whether a cell is one of its block's two central ones along an axis; so is the only one."""
    within = position % side
    return (within == side // 2) | (within == (side - 1) // 2)


def number_of_sides(rows: int, cols: int) -> int:
    """How many sides ``token_covering`` must try on a grid, rounded up to a power of two."""
    return power_of_2(min(MAX_SIDE, rows, cols).bit_length())


def row_key(kernel: str, like: Tensor) -> tuple[object, ...]:
    return kernel, dtype_class(like.dtype), like.shape[-1]


def reduce_blocks(
    features: Tensor | None,
    cu_seqlens: Tensor,
    cells: Tensor,
    *,
    mean: bool,
    bilinear: bool = False,
    where: Tensor | None = None,
    prefix: Tensor | None = None,
    addend: Tensor | None = None,
    fill_tail: bool = True,
) -> Tensor:
    """Per token, the mean or sum of ``features`` [B, rows, cols, D] over its block, kept in fp32: [capacity, D].

    ``addend`` [capacity, D] is added to the rows of blocks. Prefix rows come from ``prefix`` [num_prefix, D]; rows of neither, those
    that ``where`` leaves out and with ``fill_tail`` those past the live count are zero. ``features`` may be None where there is an ``addend``.
    """
    like: Tensor = addend if features is None else features
    capacity, width = cells.shape[0], like.shape[-1]
    out = like.new_empty(capacity, width)
    if out.numel() == 0:
        return out
    block_k, most, warps = tuned.row(like.device, *row_key("reduce_blocks", like)) or REDUCE_ROWS[0]
    block_c = min(power_of_2(width), most)
    with on_device_of(like):
        reduce_blocks_kernel[(capacity * ceil_div(width, block_c),)](
            out, features, where, prefix, addend, cu_seqlens, cells,
            *((0, 0, 0, 0) if features is None else features.stride()), *((0, 0) if prefix is None else prefix.stride()), stride(addend), stride(where),
            cu_seqlens.shape[0] - 1, 0 if prefix is None else prefix.shape[0], width,
            MEAN=mean, BILINEAR=bilinear, HAS_FEATURES=features is not None, HAS_WHERE=where is not None,
            HAS_PREFIX=prefix is not None, HAS_ADDEND=addend is not None, FILL_TAIL=fill_tail,
            BLOCK_K=block_k, BLOCK_C=block_c, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return out


def expand_blocks_(
    features: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    *,
    mean: bool = False,
    bilinear: bool = False,
    where: Tensor | None = None,
    fill_zero: bool,
) -> Tensor:
    """Write each token's values [capacity, D] (divided by its cells: ``mean``) into the cells of its block; zero elsewhere, or as it was."""
    batch_size, rows, cols, width = features.shape
    if features.numel() == 0:
        return features
    cells_of_one, warps = tuned.row(values.device, *row_key("expand_blocks", values)) or EXPAND_ROWS[0]
    programs = batch_size * ceil_div(rows * cols, cells_of_one)
    vector = math.gcd(8, width, values.stride(0), *features.stride()[:3])
    with on_device_of(features):
        expand_blocks_kernel[(programs,)](
            features, values, where, cu_seqlens, cells, *features.stride(), *values.stride(),
            stride(where), cells.shape[0], rows, cols, width,
            MEAN=mean, BILINEAR=bilinear, HAS_WHERE=where is not None, FILL_ZERO=fill_zero,
            VECTOR=vector, NUM_SIDES=number_of_sides(rows, cols), BLOCK_CELLS=cells_of_one,
            BLOCK_C=min(power_of_2(width), EXPAND_CHANNELS, EXPAND_LANES * vector), num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return features
