"""Attention within each image, backward: gradients of q, k and v from the saved log-sum-exp, bit-repeatable, without atomics.

Equivalent PyTorch: ``reference/attention.py``. Weights are computed again, block by block, from scores and log-sum-exp; then
dS = P * (dP - delta) with delta = rowsum(out * grad), which ``attention_delta_kernel`` leaves for the other two. Each gradient has one
owner: ``attention_grad_kv_kernel`` goes over an image's queries for a tile of keys, ``attention_grad_q_kernel`` over its keys for a tile of
queries. Seven matmuls instead of five are the price of sums in a fixed order. Grids and tiles as in the forward pass.
Bytes: q, k, v, out, grad once per tile that meets them, mostly from the L2 cache; dq, dk, dv once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import live_count
from ..common.softmax import LOG2_E, grad_of_scores, grad_of_values_and_scores
from ..common.tiles import add_product, dot_parts, find_block, load_rows, load_tile, store_rows, zero_rows, zero_sums
from .forward import load_bias


@triton.jit(do_not_specialize=["num_heads", "num_rows", "batch_size"])
def attention_delta_kernel(
    delta_ptr, out_ptr, grad_ptr, cu_seqlens_ptr, out_strides, grad_strides, num_heads, num_rows, batch_size,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """delta [H, T]: sum over a head of out * grad, live rows. Grid: cdiv(T, BLOCK) * H."""
    head = tl.program_id(0) % num_heads
    first = tl.program_id(0) // num_heads * BLOCK
    rows = first + tl.arange(0, BLOCK)
    live = live_count(cu_seqlens_ptr, batch_size, num_rows)
    if first >= live:
        return
    inside = rows < live
    out, out_rest = load_rows(out_ptr, out_strides, rows, inside, head, HEAD_DIM, DIM, REST, True, VECTOR)
    grad, grad_rest = load_rows(grad_ptr, grad_strides, rows, inside, head, HEAD_DIM, DIM, REST, True, VECTOR)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if REST > 0:
        delta += tl.sum(out_rest.to(tl.float32) * grad_rest.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * num_rows + rows, delta, mask=inside)


@triton.jit
def _load_statistics(lse_ptr, delta_ptr, num_rows, rows, inside, head, MASKED: tl.constexpr, NATURAL: tl.constexpr):
    """Of each query: log-sum-exp in the scores' units, delta. A masked query's weights are e^-inf = 0."""
    base = tl.cast(head, tl.int64) * num_rows + rows
    if MASKED:
        lse = tl.load(lse_ptr + base, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + base, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_ptr + base)
        delta = tl.load(delta_ptr + base)
    return lse if NATURAL else lse * LOG2_E, delta


@triton.jit
def _grad_kv_of_queries(
    grad_k, grad_k_rest, grad_v, grad_v_rest, keys, keys_rest, values, values_rest, bias, q, q_rest, grad, grad_rest,
    lse_ptr, delta_ptr, q_strides, grad_strides, start, end, head, num_rows, score_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BIASED: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M queries from ``start`` add to the gradients of a tile of keys; everything transposed, [keys, queries]."""
    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < end
    queries, queries_rest = load_tile(
        q, q_rest, q_strides, start, inside, head, HEAD_DIM, DIM, REST, BLOCK_M, MASKED, TMA, VECTOR
    )
    cotangent, cotangent_rest = load_tile(
        grad, grad_rest, grad_strides, start, inside, head, HEAD_DIM, DIM, REST, BLOCK_M, MASKED, TMA, VECTOR
    )
    lse, delta = _load_statistics(lse_ptr, delta_ptr, num_rows, rows, inside, head, MASKED, NATURAL)
    scores = dot_parts(keys, keys_rest, queries, queries_rest, REST, PRECISION) * score_scale
    if BIASED:
        scores += bias[:, None]
    grad_v, grad_v_rest, grad_scores = grad_of_values_and_scores(
        grad_v, grad_v_rest, scores, lse, delta, cotangent, cotangent_rest, values, values_rest, inside,
        REST, MASKED, NATURAL, PRECISION,
    )  # fmt: skip
    grad_k, grad_k_rest = add_product(
        grad_k, grad_k_rest, grad_scores.to(queries.dtype), queries, queries_rest, REST, PRECISION
    )
    return grad_k, grad_k_rest, grad_v, grad_v_rest


@triton.jit(do_not_specialize=["num_heads", "num_rows", "batch_size"])
def attention_grad_kv_kernel(
    grad_k_ptr, grad_v_ptr, q, q_rest, grad, grad_rest, k, k_rest, v, v_rest, lse_ptr, delta_ptr, bias_ptr,
    cu_seqlens_ptr, schedule_ptr, q_strides, grad_strides, k_strides, v_strides, bias_stride, scale, score_scale,
    num_heads, num_rows, batch_size,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, IMAGES: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [T, H, D], tails zero: BLOCK_N keys of one head. Grid: (cdiv(T, TILE) + B) * (TILE // BLOCK_N) * H."""
    head, first, begin, end = find_block(
        cu_seqlens_ptr, schedule_ptr, num_heads, batch_size, num_rows, BLOCK_N, TILE, IMAGES
    )
    rows = first + tl.arange(0, BLOCK_N)
    if first >= end:
        if end == 0:
            zero_rows(grad_k_ptr, num_heads, rows, rows < num_rows, head, HEAD_DIM, DIM, REST, BLOCK_N)
            zero_rows(grad_v_ptr, num_heads, rows, rows < num_rows, head, HEAD_DIM, DIM, REST, BLOCK_N)
        return
    # wgmma reads from shared memory what came through pointers; what came by a descriptor would take registers. fp32 has no wgmma.
    OWN_TMA: tl.constexpr = TMA and NATURAL
    inside = rows < end
    keys, keys_rest = load_tile(
        k, k_rest, k_strides, first, inside, head, HEAD_DIM, DIM, REST, BLOCK_N, not OWN_TMA, OWN_TMA, VECTOR
    )
    values, values_rest = load_tile(
        v, v_rest, v_strides, first, inside, head, HEAD_DIM, DIM, REST, BLOCK_N, not OWN_TMA, OWN_TMA, VECTOR
    )
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, bias_stride, rows, inside, True, NATURAL)
    scale = tl.cast(scale, tl.float32)
    score_scale = tl.cast(score_scale, tl.float32)
    grad_k, grad_k_rest = zero_sums(BLOCK_N, DIM, REST)
    grad_v, grad_v_rest = zero_sums(BLOCK_N, DIM, REST)
    ragged = end - (end - begin) % BLOCK_M  # full blocks of queries need no mask
    for start in range(begin, ragged, BLOCK_M):
        grad_k, grad_k_rest, grad_v, grad_v_rest = _grad_kv_of_queries(
            grad_k, grad_k_rest, grad_v, grad_v_rest, keys, keys_rest, values, values_rest, bias,
            q, q_rest, grad, grad_rest, lse_ptr, delta_ptr, q_strides, grad_strides, start, end, head, num_rows,
            score_scale, HEAD_DIM, DIM, REST, BLOCK_M, bias_ptr is not None, False, TMA, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    if ragged < end:
        grad_k, grad_k_rest, grad_v, grad_v_rest = _grad_kv_of_queries(
            grad_k, grad_k_rest, grad_v, grad_v_rest, keys, keys_rest, values, values_rest, bias,
            q, q_rest, grad, grad_rest, lse_ptr, delta_ptr, q_strides, grad_strides, ragged, end, head, num_rows,
            score_scale, HEAD_DIM, DIM, REST, BLOCK_M, bias_ptr is not None, True, TMA, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    store_rows(grad_k_ptr, grad_k * scale, grad_k_rest * scale, num_heads, rows, inside, head, HEAD_DIM, DIM, REST)
    store_rows(grad_v_ptr, grad_v, grad_v_rest, num_heads, rows, inside, head, HEAD_DIM, DIM, REST)


@triton.jit
def _grad_q_of_keys(
    grad_q, grad_q_rest, queries, queries_rest, cotangent, cotangent_rest, lse, delta, k, k_rest, v, v_rest,
    k_strides, v_strides, bias_ptr, bias_stride, start, end, head, score_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N keys from ``start`` add to the gradient of a tile of queries."""
    rows = start + tl.arange(0, BLOCK_N)
    valid = rows < end
    keys, keys_rest = load_tile(
        k, k_rest, k_strides, start, valid, head, HEAD_DIM, DIM, REST, BLOCK_N, MASKED, TMA, VECTOR
    )
    values, values_rest = load_tile(
        v, v_rest, v_strides, start, valid, head, HEAD_DIM, DIM, REST, BLOCK_N, MASKED and not TMA, TMA, VECTOR
    )
    scores = dot_parts(queries, queries_rest, keys, keys_rest, REST, PRECISION) * score_scale
    if bias_ptr is not None:
        scores += load_bias(bias_ptr, bias_stride, rows, valid, MASKED, NATURAL)[None, :]
    grad_scores = grad_of_scores(
        scores, lse, delta, cotangent, cotangent_rest, values, values_rest, REST, NATURAL, PRECISION
    )
    if MASKED:
        grad_scores = tl.where(valid[None, :], grad_scores, 0.0)
    return add_product(grad_q, grad_q_rest, grad_scores.to(keys.dtype), keys, keys_rest, REST, PRECISION)


@triton.jit(do_not_specialize=["num_heads", "num_rows", "batch_size"])
def attention_grad_q_kernel(
    grad_q_ptr, q, q_rest, grad, grad_rest, k, k_rest, v, v_rest, lse_ptr, delta_ptr, bias_ptr,
    cu_seqlens_ptr, schedule_ptr, q_strides, grad_strides, k_strides, v_strides, bias_stride, scale, score_scale,
    num_heads, num_rows, batch_size,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, IMAGES: tl.constexpr, TMA: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D], tail zero: BLOCK_M queries of one head. Grid: (cdiv(T, TILE) + B) * (TILE // BLOCK_M) * H."""
    head, first, begin, end = find_block(
        cu_seqlens_ptr, schedule_ptr, num_heads, batch_size, num_rows, BLOCK_M, TILE, IMAGES
    )
    rows = first + tl.arange(0, BLOCK_M)
    if first >= end:
        if end == 0:
            zero_rows(grad_q_ptr, num_heads, rows, rows < num_rows, head, HEAD_DIM, DIM, REST, BLOCK_M)
        return
    OWN_TMA: tl.constexpr = TMA and NATURAL  # as in the kernel above
    inside = rows < end
    queries, queries_rest = load_tile(
        q, q_rest, q_strides, first, inside, head, HEAD_DIM, DIM, REST, BLOCK_M, not OWN_TMA, OWN_TMA, VECTOR
    )
    cotangent, cotangent_rest = load_tile(
        grad, grad_rest, grad_strides, first, inside, head, HEAD_DIM, DIM, REST, BLOCK_M, not OWN_TMA, OWN_TMA, VECTOR
    )
    lse, delta = _load_statistics(lse_ptr, delta_ptr, num_rows, rows, inside, head, True, NATURAL)
    scale = tl.cast(scale, tl.float32)
    score_scale = tl.cast(score_scale, tl.float32)
    grad_q, grad_q_rest = zero_sums(BLOCK_M, DIM, REST)
    ragged = end - (end - begin) % BLOCK_N  # full blocks of keys need no mask
    for start in range(begin, ragged, BLOCK_N):
        grad_q, grad_q_rest = _grad_q_of_keys(
            grad_q, grad_q_rest, queries, queries_rest, cotangent, cotangent_rest, lse, delta, k, k_rest, v, v_rest,
            k_strides, v_strides, bias_ptr, bias_stride, start, end, head, score_scale,
            HEAD_DIM, DIM, REST, BLOCK_N, False, TMA, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    if ragged < end:
        grad_q, grad_q_rest = _grad_q_of_keys(
            grad_q, grad_q_rest, queries, queries_rest, cotangent, cotangent_rest, lse, delta, k, k_rest, v, v_rest,
            k_strides, v_strides, bias_ptr, bias_stride, ragged, end, head, score_scale,
            HEAD_DIM, DIM, REST, BLOCK_N, True, TMA, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    store_rows(grad_q_ptr, grad_q * scale, grad_q_rest * scale, num_heads, rows, inside, head, HEAD_DIM, DIM, REST)
