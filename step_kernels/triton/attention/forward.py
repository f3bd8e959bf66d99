"""Attention within each image, forward: softmax(q k^T * scale + key_bias) v without ever storing the scores.

Equivalent PyTorch: ``reference/attention.py``. Grid: one program per (BLOCK_M rows of an image, head), heads innermost, so that the first
tiles of a schedule, those of the longest image, start first in all heads. Each goes over its image's keys once, BLOCK_N at a time, and
keeps a running maximum and sum (FlashAttention). Bytes: q and out once; k and v once per tile of queries, mostly from the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiles import dot_parts, find_tile, load_tile, store_rows, zero_rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """2^x or, where scores are in natural units, e^x.

    16-bit kernels hold scores in units of log2, which saves a multiplication per score; in fp32 the rounding of that change of units would
    be as large as all other errors of a weight.
    """
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def attend(
    accumulator, accumulator_rest, total, maximum, q, q_rest, k, k_rest, v, v_rest, bias, valid, scale,
    REST: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys more: scores in the units of ``scale`` and ``bias``, then the running softmax."""
    scores = dot_parts(q, q_rest, k, k_rest, REST, PRECISION)  # [BLOCK_M, BLOCK_N]
    if BIASED or MASKED:
        scores = scores * scale
        if BIASED:
            scores += bias[None, :]
        if MASKED:
            scores = tl.where(valid[None, :], scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
    else:  # scale >= 0: the product moves into the exponent, one fused instruction per score
        highest = tl.maximum(maximum, tl.max(scores, 1) * scale)
    # Where all scores so far are -inf the weights are zero, not NaN: later keys may have finite scores.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    if BIASED or MASKED:
        weights = exponential(scores - shift[:, None], NATURAL)
    else:
        weights = exponential(scores * scale - shift[:, None], NATURAL)
    faded = exponential(maximum - shift, NATURAL)
    total = total * faded + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    accumulator = tl.dot(weights, v, accumulator * faded[:, None], input_precision=PRECISION)
    if REST > 0:
        accumulator_rest = tl.dot(weights, v_rest, accumulator_rest * faded[:, None], input_precision=PRECISION)
    return accumulator, accumulator_rest, total, highest


@triton.jit
def finish_rows(maximum, total, NATURAL: tl.constexpr):
    """What to divide a row's sums by, and its log-sum-exp.

    A row whose scores are all -inf becomes zero, as PyTorch's attention has it; its log-sum-exp is +inf, so that a backward pass, too, gives
    all its keys the weight zero. (With a NaN among the scores the total is NaN.)
    """
    lse = maximum + tl.log(total) if NATURAL else (maximum + tl.log2(total)) * LN_2
    return tl.where(total == 0.0, 1.0, total), tl.where(total == 0.0, float("inf"), lse)


@triton.jit
def attend_tile(
    accumulator, accumulator_rest, total, maximum, q, q_rest, k, k_rest, v, v_rest, k_strides, v_strides,
    bias_ptr, bias_stride, start, end, head, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load the keys and values of BLOCK_N rows from ``start`` and attend to them; MASKED: to those before ``end``."""
    rows = start + tl.arange(0, BLOCK_N)
    valid = rows < end
    # Scores of rows past the end are masked, so only v, which meets weights of zero, must not hold NaN there.
    keys, keys_rest = load_tile(
        k, k_rest, k_strides, start, valid, head, HEAD_DIM, DIM, REST, BLOCK_N, MASKED and not TMA, TMA, VECTOR
    )
    values, values_rest = load_tile(
        v, v_rest, v_strides, start, valid, head, HEAD_DIM, DIM, REST, BLOCK_N, MASKED, TMA, VECTOR
    )
    bias = total
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, bias_stride, rows, valid, MASKED, NATURAL)
    return attend(
        accumulator, accumulator_rest, total, maximum, q, q_rest, keys, keys_rest, values, values_rest, bias, valid,
        scale, REST, bias_ptr is not None, MASKED, NATURAL, PRECISION,
    )  # fmt: skip


@triton.jit
def load_bias(bias_ptr, stride, rows, valid, MASKED: tl.constexpr, NATURAL: tl.constexpr):
    """The keys' biases, fp32, in the scores' units."""
    pointers = bias_ptr + rows.to(tl.int64) * stride
    bias = tl.load(pointers, mask=valid, other=0.0) if MASKED else tl.load(pointers)
    bias = bias.to(tl.float32)
    return bias if NATURAL else bias * LOG2_E


@triton.jit
def attention_forward_kernel(
    out_ptr, lse_ptr, q, q_rest, k, k_rest, v, v_rest, bias_ptr, cu_seqlens_ptr, schedule_ptr,
    q_strides, k_strides, v_strides, bias_stride, scale, num_heads, num_rows, batch_size,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, IMAGES: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr,
    NEGATIVE: tl.constexpr, FILL_TAIL: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [T, H, D] and lse [H, T] (unless None). Grid: (cdiv(T, TILE) + B) * (TILE // BLOCK_M) * H."""
    head = tl.program_id(0) % num_heads
    block = tl.program_id(0) // num_heads
    first, begin, end = find_tile(
        cu_seqlens_ptr, schedule_ptr, block // (TILE // BLOCK_M), batch_size, num_rows, TILE, IMAGES
    )
    first += block % (TILE // BLOCK_M) * BLOCK_M
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
    queries, queries_rest = load_tile(
        q, q_rest, q_strides, first, inside, head, HEAD_DIM, DIM, REST, BLOCK_M, not TMA, TMA, VECTOR
    )
    if NEGATIVE:  # scale is its magnitude; a change of sign is exact
        queries = -queries
        queries_rest = -queries_rest
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, DIM], tl.float32)
    accumulator_rest = accumulator
    if REST > 0:
        accumulator_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    ragged = end - (end - begin) % BLOCK_N  # full blocks of keys need no mask
    for start in range(begin, ragged, BLOCK_N):
        accumulator, accumulator_rest, total, maximum = attend_tile(
            accumulator, accumulator_rest, total, maximum, queries, queries_rest, k, k_rest, v, v_rest,
            k_strides, v_strides, bias_ptr, bias_stride, start, end, head, scale,
            HEAD_DIM, DIM, REST, BLOCK_N, False, TMA, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    if ragged < end:
        accumulator, accumulator_rest, total, maximum = attend_tile(
            accumulator, accumulator_rest, total, maximum, queries, queries_rest, k, k_rest, v, v_rest,
            k_strides, v_strides, bias_ptr, bias_stride, ragged, end, head, scale,
            HEAD_DIM, DIM, REST, BLOCK_N, True, TMA, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    total, lse = finish_rows(maximum, total, NATURAL)
    if lse_ptr is not None:
        tl.store(lse_row, lse, mask=inside)
    store_rows(
        out_ptr, accumulator / total[:, None], accumulator_rest / total[:, None], num_heads, rows, inside, head,
        HEAD_DIM, DIM, REST,
    )  # fmt: skip
