"""What the attention kernels share: which rows a program works on, and loads and stores of one head's rows.

A head dimension that is no power of two is held in two parts, DIM and REST columns (see ``operands.split_head_dim``); REST is 0 where one
part is enough, and the second value of a pair is then a stand-in that nobody uses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .live_rows import live_count, within
from .matrix import add_dot, dot

# Images whose tiles are counted at a time: one step for most batches, no more registers than the rest needs.
IMAGES = 128


@triton.jit
def find_tile(cu_seqlens_ptr, schedule_ptr, tile, batch_size, num_rows, TILE: tl.constexpr, IMAGES: tl.constexpr):
    """(first row of the tile, first row and end of its image); tiles past the last cover the tail and have end 0."""
    if schedule_ptr is not None:
        entry = schedule_ptr + tile.to(tl.int64) * 4
        first = tl.load(entry)
        begin = tl.load(entry + 1)
        end = tl.load(entry + 2)
    else:
        first = 0
        begin = 0
        end = 0
        total = 0
        for start in range(0, batch_size, IMAGES):
            image = start + tl.arange(0, IMAGES)
            left = tl.load(cu_seqlens_ptr + image, mask=image < batch_size, other=0)
            right = tl.load(cu_seqlens_ptr + image + 1, mask=image < batch_size, other=0)
            count = tl.cdiv(right - left, TILE)
            stop = total + tl.cumsum(count, 0)
            index = tile - (stop - count)  # of the tile within the image
            mine = (index >= 0) & (index < count)
            first += tl.sum(tl.where(mine, left + index * TILE, 0), 0)
            begin += tl.sum(tl.where(mine, left, 0), 0)
            end += tl.sum(tl.where(mine, right, 0), 0)
            total += tl.sum(count, 0)
        if tile >= total:
            first = tail_row(live_count(cu_seqlens_ptr, batch_size, num_rows), tile - total, num_rows, TILE)
    return within(first, num_rows), within(begin, num_rows), within(end, num_rows)


@triton.jit
def find_block(
    cu_seqlens_ptr, schedule_ptr, num_heads, batch_size, num_rows,
    BLOCK: tl.constexpr, TILE: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Of this program: head, first of its BLOCK rows, first row and end of their image, as of the tile that they are part of."""
    head = tl.program_id(0) % num_heads
    block = tl.program_id(0) // num_heads
    first, begin, end = find_tile(
        cu_seqlens_ptr, schedule_ptr, block // (TILE // BLOCK), batch_size, num_rows, TILE, IMAGES
    )
    return head, first + block % (TILE // BLOCK) * BLOCK, begin, end


@triton.jit
def tail_row(live, index, num_rows, TILE: tl.constexpr):
    """First row of the tail's tile ``index``, int32; ``num_rows`` where there is none. Near 2^31 rows the sum needs 64 bits."""
    row = live + tl.cast(index, tl.int64) * TILE
    return tl.minimum(row, tl.cast(num_rows, tl.int64)).to(tl.int32)


@triton.jit
def _load_part(
    base, offsets, column_stride, inside, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
    FIRST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """[rows, SIZE]: columns FIRST .. FIRST + SIZE, zero past HEAD_DIM and, when MASKED, in rows that are not inside."""
    columns = FIRST + tl.arange(0, SIZE)
    pointers = base + offsets + columns[None, :] * column_stride
    if MASKED and FIRST + SIZE > HEAD_DIM:
        return tl.load(pointers, mask=inside[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif FIRST + SIZE > HEAD_DIM:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(
    source, strides, rows, inside, head, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    MASKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One head of the given rows through pointers, as its two parts; any rows, in any order."""
    # Triton knows of multiples of 16 by itself; heads of 72 and 88 are multiples of 8, enough for loads of 16 bytes.
    base = source + tl.multiple_of(tl.cast(head, tl.int64) * strides[1], VECTOR)
    offsets = tl.multiple_of(rows.to(tl.int64)[:, None] * strides[0], (VECTOR, VECTOR))
    part = _load_part(base, offsets, strides[2], inside, HEAD_DIM, MASKED, 0, DIM)
    rest = part
    if REST > 0:
        rest = _load_part(base, offsets, strides[2], inside, HEAD_DIM, MASKED, DIM, REST)
    return part, rest


@triton.jit
def load_tile(
    source, source_rest, strides, first, inside, head, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK successive rows, as its two parts; by TMA ``source`` and ``source_rest`` are descriptors [T, H, D]."""
    if TMA:
        part = source.load([first, head, 0]).reshape([BLOCK, DIM])
        if MASKED:  # the rows that follow an image's end may hold NaN
            part = tl.where(inside[:, None], part, tl.zeros([BLOCK, DIM], part.dtype))
        rest = part
        if REST > 0:
            rest = source_rest.load([first, head, DIM]).reshape([BLOCK, REST])
            if MASKED:
                rest = tl.where(inside[:, None], rest, tl.zeros([BLOCK, REST], rest.dtype))
    else:
        rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        part, rest = load_rows(source, strides, rows, inside, head, HEAD_DIM, DIM, REST, MASKED, VECTOR)
    return part, rest


@triton.jit
def _store_part(
    out_ptr, value, num_heads, rows, inside, head, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr
):
    """Columns FIRST .. FIRST + SIZE of one head of a contiguous [T, H, D]."""
    columns = FIRST + tl.arange(0, SIZE)
    pointers = out_ptr + ((rows.to(tl.int64) * num_heads + head) * HEAD_DIM)[:, None] + columns[None, :]
    mask = inside[:, None]
    if FIRST + SIZE > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    out_ptr, part, rest, num_heads, rows, inside, head,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Both parts of one head of the rows that are inside, into a contiguous [T, H, D]."""
    _store_part(out_ptr, part, num_heads, rows, inside, head, HEAD_DIM, 0, DIM)
    if REST > 0:
        _store_part(out_ptr, rest, num_heads, rows, inside, head, HEAD_DIM, DIM, REST)


@triton.jit
def zero_sums(ROWS: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr):
    """The two parts of a sum."""
    part = tl.zeros([ROWS, DIM], tl.float32)
    rest = part
    if REST > 0:
        rest = tl.zeros([ROWS, REST], tl.float32)
    return part, rest


@triton.jit
def zero_rows(
    out_ptr, num_heads, rows, inside, head, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros in one head of the rows that are inside."""
    part, rest = zero_sums(BLOCK, DIM, REST)
    store_rows(out_ptr, part, rest, num_heads, rows, inside, head, HEAD_DIM, DIM, REST)


@triton.jit
def dot_parts(a, a_rest, b, b_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T over both parts of the head dimension, fp32."""
    product = dot(a, b.T, None, PRECISION)
    if REST > 0:
        product = dot(a_rest, b_rest.T, product, PRECISION)
    return product


@triton.jit
def add_product(sums, sums_rest, weights, part, rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """sums + weights @ rows, both in two parts of the head dimension."""
    sums = add_dot(sums, weights, part, PRECISION)
    if REST > 0:
        sums_rest = add_dot(sums_rest, weights, rest, PRECISION)
    return sums, sums_rest
