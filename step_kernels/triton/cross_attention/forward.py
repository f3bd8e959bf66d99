"""Attention of one set of queries per image to one set of keys: what masked_attention and class_attention share. Forward and backward.

A program finds its rows by one of two rules. *Indexed*: an image's rows are ``rows[image]``, the first ``counts[image]`` of which take part
(``masked_attention``). *Ragged*: queries are all rows of the image, keys the rows ``cu_seqlens[image]`` to ``cu_seqlens[image + 1]`` of
one packed tensor (``class_attention``). Equivalent PyTorch: ``reference/masked_attention.py``, ``reference/class_attention.py``.

The running softmax is that of ragged_attention; gradients: ``backward.py``. No program loads rows that take no part (they
may hold NaN); they get their zeros from the program in whose tile the index puts them, so that no launch is needed to fill.
Bytes: queries that take part once, keys and values once per tile of queries (mostly from the L2 cache); all rows of the output once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import rows_of
from ..common.softmax import attend_keys, finish_rows
from ..common.tiles import load_rows, store_rows, zero_sums


@triton.jit
def load_operand(
    source, strides, image, rows, inside, head, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    MASKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One head of the given rows of an image, as its two parts. ``strides``: row, head, column, image."""
    base = source + tl.multiple_of(image * strides[3], VECTOR)
    return load_rows(base, strides, rows, inside, head, HEAD_DIM, DIM, REST, MASKED, VECTOR)


@triton.jit
def load_keys(
    k_ptr, v_ptr, rows_ptr, k_strides, v_strides, image, start, end, length, head,
    GATHER: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Keys and values at BLOCK_N positions from ``start``, and which of these exist; MASKED: not all may."""
    rows = start + tl.arange(0, BLOCK_N)
    valid = rows < end
    if GATHER:
        index = rows_ptr + image * length + rows
        rows = tl.load(index, mask=valid, other=0) if MASKED else tl.load(index)
    keys, keys_rest = load_operand(k_ptr, k_strides, image, rows, valid, head, HEAD_DIM, DIM, REST, MASKED, VECTOR)
    values, values_rest = load_operand(v_ptr, v_strides, image, rows, valid, head, HEAD_DIM, DIM, REST, MASKED, VECTOR)
    return keys, keys_rest, values, values_rest, valid


@triton.jit
def store_or_zero(
    out_ptr, part, rest, num_heads, rows, live, stored, head,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Both parts where ``live``, zeros in the other rows that are ``stored``."""
    part = tl.where(live[:, None], part, 0.0)
    if REST > 0:
        rest = tl.where(live[:, None], rest, 0.0)
    store_rows(out_ptr, part, rest, num_heads, rows, stored, head, HEAD_DIM, DIM, REST)


@triton.jit
def find_queries(
    rows_ptr, counts_ptr, cu_seqlens_ptr, num_heads, num_queries, num_keys, GATHER: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Of this program: image, head, its queries' rows, which of them are to be computed, which stored, and its range of keys."""
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    tiles = tl.cdiv(num_queries, BLOCK_M)
    image = (tile // tiles).to(tl.int64)
    first = tile % tiles * BLOCK_M
    position = first + tl.arange(0, BLOCK_M)
    rows = position
    count = num_queries  # that take part
    if rows_ptr is not None:
        index = rows_ptr + image * num_queries + position
        rows = tl.load(index, mask=position < num_queries, other=0)
        count = tl.load(counts_ptr + image)
    begin = 0
    end = num_queries
    if cu_seqlens_ptr is not None:
        begin, end = rows_of(cu_seqlens_ptr, image, num_keys)
    elif GATHER:
        end = count
    live = position < tl.where(begin < end, count, 0)  # without keys: zeros
    end = tl.where(first < count, end, begin)  # a tile of zeros has no keys to go over
    return image, head, rows, live, position < num_queries, begin, end


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def cross_attention_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, rows_ptr, counts_ptr, cu_seqlens_ptr,
    q_strides, k_strides, v_strides, score_scale, num_heads, num_queries, num_keys,
    GATHER: tl.constexpr, NEGATIVE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, num_queries, H, D] and lse [B, H, num_queries] (unless None). Grid: B * cdiv(num_queries, BLOCK_M) * H."""
    image, head, rows, live, stored, begin, end = find_queries(
        rows_ptr, counts_ptr, cu_seqlens_ptr, num_heads, num_queries, num_keys, GATHER, BLOCK_M
    )
    score_scale = tl.cast(score_scale, tl.float32)
    queries, queries_rest = load_operand(q_ptr, q_strides, image, rows, live, head, HEAD_DIM, DIM, REST, True, VECTOR)
    if NEGATIVE:  # score_scale is the magnitude; a change of sign is exact
        queries = -queries
        queries_rest = -queries_rest
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums, sums_rest = zero_sums(BLOCK_M, DIM, REST)
    ragged = end - (end - begin) % BLOCK_N  # full blocks of keys need no mask
    for start in range(begin, ragged, BLOCK_N):
        keys, keys_rest, values, values_rest, valid = load_keys(
            k_ptr, v_ptr, rows_ptr, k_strides, v_strides, image, start, end, num_queries, head,
            GATHER, HEAD_DIM, DIM, REST, BLOCK_N, False, VECTOR,
        )  # fmt: skip
        sums, sums_rest, total, maximum = attend_keys(
            sums, sums_rest, total, maximum, queries, queries_rest, keys, keys_rest, values, values_rest, total, valid,
            score_scale, REST, False, False, NATURAL, PRECISION,
        )  # fmt: skip
    if ragged < end:
        keys, keys_rest, values, values_rest, valid = load_keys(
            k_ptr, v_ptr, rows_ptr, k_strides, v_strides, image, ragged, end, num_queries, head,
            GATHER, HEAD_DIM, DIM, REST, BLOCK_N, True, VECTOR,
        )  # fmt: skip
        sums, sums_rest, total, maximum = attend_keys(
            sums, sums_rest, total, maximum, queries, queries_rest, keys, keys_rest, values, values_rest, total, valid,
            score_scale, REST, False, True, NATURAL, PRECISION,
        )  # fmt: skip
    total, lse = finish_rows(maximum, total, NATURAL)
    if lse_ptr is not None:
        lse = tl.where(live, lse, 0.0)
        tl.store(lse_ptr + (image * num_heads + head) * num_queries + rows, lse, mask=stored)
    store_or_zero(
        out_ptr, sums / total[:, None], sums_rest / total[:, None], num_heads, image * num_queries + rows, live, stored,
        head, HEAD_DIM, DIM, REST,
    )  # fmt: skip
