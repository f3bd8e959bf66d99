"""Attention within each image, forward: softmax(q k^T * scale + key_bias) v without ever storing the scores.

Equivalent PyTorch: ``reference/attention.py``. Grid: one program per (BLOCK_M rows of an image, head), heads innermost, so that the first
tiles of a schedule, those of the longest image, start first in all heads. Each goes over its image's keys once, BLOCK_N at a time, and
keeps a running maximum and sum (``common/softmax.py``). Bytes: q and out once; k and v once per tile of queries, mostly from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.softmax import LOG2_E, attend_keys, finish_rows
from ..common.tiles import find_block, load_rows, load_tile, store_rows, zero_rows, zero_sums


@triton.jit
def attend_tile(
    accumulator, accumulator_rest, total, maximum, q, q_rest, k, k_rest, v, v_rest, k_strides, v_strides,
    bias_ptr, bias_stride, first, start, end, head, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load the keys and values of BLOCK_N rows from ``first`` and attend to those from ``start`` on; MASKED: and before ``end``."""
    rows = first + tl.arange(0, BLOCK_N)
    valid = rows < end if MASKED else rows >= start
    # Scores of rows past the end are masked, so only v, which meets weights of zero, must not hold NaN there.
    keys, keys_rest = load_tile(
        k, k_rest, k_strides, first, valid, head, HEAD_DIM, DIM, REST, BLOCK_N, MASKED and not TMA, TMA, VECTOR
    )
    values, values_rest = load_tile(
        v, v_rest, v_strides, first, valid, head, HEAD_DIM, DIM, REST, BLOCK_N, MASKED, TMA, VECTOR
    )
    masked = MASKED
    bias = total
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, bias_stride, rows, valid, MASKED, NATURAL)
    if TMA and not MASKED:
        if bias_ptr is not None:  # a choice per key, where without biases a branch spares one per score
            bias = tl.where(valid, bias, float("-inf"))
        else:
            masked = first < start
    return attend_keys(
        accumulator, accumulator_rest, total, maximum, q, q_rest, keys, keys_rest, values, values_rest, bias, valid,
        scale, REST, bias_ptr is not None, masked, NATURAL, PRECISION,
    )  # fmt: skip


@triton.jit
def load_bias(bias_ptr, stride, rows, valid, MASKED: tl.constexpr, NATURAL: tl.constexpr):
    """The keys' biases, fp32, in the scores' units."""
    pointers = bias_ptr + rows.to(tl.int64) * stride
    bias = tl.load(pointers, mask=valid, other=0.0) if MASKED else tl.load(pointers)
    bias = bias.to(tl.float32)
    return bias if NATURAL else bias * LOG2_E


@triton.jit(do_not_specialize=["num_heads", "num_rows", "batch_size"])
def attention_forward_kernel(
    out_ptr, lse_ptr, q_ptr, k, k_rest, v, v_rest, bias_ptr, cu_seqlens_ptr, schedule_ptr,
    q_strides, k_strides, v_strides, bias_stride, scale, num_heads, num_rows, batch_size,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, IMAGES: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr,
    NEGATIVE: tl.constexpr, FILL_TAIL: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [T, H, D] and lse [H, T] (unless None). Grid: (cdiv(T, TILE) + B) * (TILE // BLOCK_M) * H."""
    head, first, begin, end = find_block(
        cu_seqlens_ptr, schedule_ptr, num_heads, batch_size, num_rows, BLOCK_M, TILE, IMAGES
    )
    rows = first + tl.arange(0, BLOCK_M)
    lse_row = lse_ptr
    if lse_ptr is not None:
        lse_row = lse_ptr + head.to(tl.int64) * num_rows + rows
    if first >= end:
        if FILL_TAIL and end == 0:
            zero_rows(out_ptr, num_heads, rows, rows < num_rows, head, HEAD_DIM, DIM, REST, BLOCK_M)
            if lse_ptr is not None:
                tl.store(lse_row, tl.zeros([BLOCK_M], tl.float32), mask=rows < num_rows)
        return
    inside = rows < end
    scale = tl.cast(scale, tl.float32)
    # Through pointers on any route: then wgmma reads them from shared memory, where after a descriptor they would take registers.
    queries, queries_rest = load_rows(q_ptr, q_strides, rows, inside, head, HEAD_DIM, DIM, REST, True, VECTOR)
    if NEGATIVE:  # scale is its magnitude; a change of sign is exact
        queries = -queries
        queries_rest = -queries_rest
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator, accumulator_rest = zero_sums(BLOCK_M, DIM, REST)
    if TMA and begin + BLOCK_N <= end:
        # The last block reaches back over keys already counted: loaded whole while the one before is at work, it needs a mask of scores only.
        for start in range(begin, end, BLOCK_N):
            accumulator, accumulator_rest, total, maximum = attend_tile(
                accumulator, accumulator_rest, total, maximum, queries, queries_rest, k, k_rest, v, v_rest,
                k_strides, v_strides, bias_ptr, bias_stride, tl.minimum(start, end - BLOCK_N), start, end, head, scale,
                HEAD_DIM, DIM, REST, BLOCK_N, False, TMA, VECTOR, NATURAL, PRECISION,
            )  # fmt: skip
    else:
        ragged = begin
        if not TMA:  # mma.sync: that mask's branch would part the scores from the next product's layout, and cost a third of each step
            ragged = end - (end - begin) % BLOCK_N
            for start in range(begin, ragged, BLOCK_N):
                accumulator, accumulator_rest, total, maximum = attend_tile(
                    accumulator, accumulator_rest, total, maximum, queries, queries_rest, k, k_rest, v, v_rest,
                    k_strides, v_strides, bias_ptr, bias_stride, start, start, end, head, scale,
                    HEAD_DIM, DIM, REST, BLOCK_N, False, TMA, VECTOR, NATURAL, PRECISION,
                )  # fmt: skip
        if ragged < end:
            accumulator, accumulator_rest, total, maximum = attend_tile(
                accumulator, accumulator_rest, total, maximum, queries, queries_rest, k, k_rest, v, v_rest,
                k_strides, v_strides, bias_ptr, bias_stride, ragged, ragged, end, head, scale,
                HEAD_DIM, DIM, REST, BLOCK_N, True, TMA, VECTOR, NATURAL, PRECISION,
            )  # fmt: skip
    total, lse = finish_rows(maximum, total, NATURAL)
    if lse_ptr is not None:
        tl.store(lse_row, lse, mask=inside)
    store_rows(
        out_ptr, accumulator / total[:, None], accumulator_rest / total[:, None], num_heads, rows, inside, head,
        HEAD_DIM, DIM, REST,
    )  # fmt: skip
