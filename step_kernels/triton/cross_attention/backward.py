"""Gradients of cross attention (``forward.py``) from the saved log-sum-exp: two kernels, bit-repeatable, without atomics.

Weights P are computed again, block by block; then dS = P * (dP - delta) with delta = rowsum(out * grad), plus, for class_attention, the
gradient of its mean scores, a share of which belongs to every head. Each gradient has one owner: ``grad_queries_kernel`` goes over the
keys of a tile of queries and leaves delta for ``grad_keys_kernel``, which goes over the queries of a tile of keys. Rows as in the
forward pass. Equivalent PyTorch: ``attention_gradients`` of ``reference/attention.py``.
Bytes: q, k, v, grad once per tile that meets them, mostly from the L2 cache; out once; dq, dk, dv once, zeros included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import image_of
from ..common.softmax import LOG2_E, grad_of_scores, grad_of_values_and_scores
from ..common.tiles import add_product, dot_parts, find_tile, zero_sums
from .forward import find_queries, load_keys, load_operand, store_or_zero


@triton.jit
def _load_mean_scores(grad_scores_ptr, strides, tokens, classes, mask, num_heads):
    """What every head gets of the gradient of the mean scores [T, C], at a block of tokens and classes."""
    address = tokens.to(tl.int64) * strides[0] + classes.to(tl.int64) * strides[1]
    share = tl.load(grad_scores_ptr + address, mask=mask, other=0.0).to(tl.float32)
    return share / num_heads


@triton.jit
def _grad_of_block(
    sums, sums_rest, queries, queries_rest, cotangent, cotangent_rest, lse, delta,
    k_ptr, v_ptr, grad_scores_ptr, rows_ptr, k_strides, v_strides, score_strides,
    image, rows, live, start, end, head, num_heads, num_queries, score_scale,
    HAS_GRAD: tl.constexpr, GATHER: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N keys from ``start`` add to the gradient of a tile of queries (but for the scale)."""
    keys, keys_rest, values, values_rest, valid = load_keys(
        k_ptr, v_ptr, rows_ptr, k_strides, v_strides, image, start, end, num_queries, head,
        GATHER, HEAD_DIM, DIM, REST, BLOCK_N, MASKED, VECTOR,
    )  # fmt: skip
    of_scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if grad_scores_ptr is not None:
        tokens = start + tl.arange(0, BLOCK_N)
        of_scores = _load_mean_scores(
            grad_scores_ptr, score_strides, tokens[None, :], rows[:, None], live[:, None] & valid[None, :], num_heads
        )
    if HAS_GRAD:
        scores = dot_parts(queries, queries_rest, keys, keys_rest, REST, PRECISION) * score_scale
        of_scores += grad_of_scores(
            scores, lse, delta, cotangent, cotangent_rest, values, values_rest, REST, NATURAL, PRECISION
        )
    if MASKED:
        of_scores = tl.where(valid[None, :], of_scores, 0.0)
    return add_product(sums, sums_rest, of_scores.to(keys.dtype), keys, keys_rest, REST, PRECISION)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def grad_queries_kernel(
    grad_q_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, grad_scores_ptr, lse_ptr,
    rows_ptr, counts_ptr, cu_seqlens_ptr, q_strides, k_strides, v_strides, out_strides, grad_strides, score_strides,
    scale, score_scale, num_heads, num_queries, num_keys,
    GATHER: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, num_queries, H, D], delta [B, H, num_queries]. Grid: B * cdiv(num_queries, BLOCK_M) * H. No grad_ptr: scores alone."""
    image, head, rows, live, stored, begin, end = find_queries(
        rows_ptr, counts_ptr, cu_seqlens_ptr, num_heads, num_queries, num_keys, GATHER, BLOCK_M
    )
    score_scale = tl.cast(score_scale, tl.float32)
    queries, queries_rest = load_operand(q_ptr, q_strides, image, rows, live, head, HEAD_DIM, DIM, REST, True, VECTOR)
    cotangent = queries
    cotangent_rest = queries_rest
    lse = tl.zeros([BLOCK_M], tl.float32)
    delta = lse
    if grad_ptr is not None:
        cotangent, cotangent_rest = load_operand(
            grad_ptr, grad_strides, image, rows, live, head, HEAD_DIM, DIM, REST, True, VECTOR
        )
        out, out_rest = load_operand(out_ptr, out_strides, image, rows, live, head, HEAD_DIM, DIM, REST, True, VECTOR)
        delta = tl.sum(out.to(tl.float32) * cotangent.to(tl.float32), 1)
        if REST > 0:
            delta += tl.sum(out_rest.to(tl.float32) * cotangent_rest.to(tl.float32), 1)
        place = (image * num_heads + head) * num_queries + rows
        tl.store(delta_ptr + place, delta, mask=live)
        lse = tl.load(lse_ptr + place, mask=live, other=0.0)
        lse = lse if NATURAL else lse * LOG2_E
    sums, sums_rest = zero_sums(BLOCK_M, DIM, REST)
    ragged = end - (end - begin) % BLOCK_N  # full blocks of keys need no mask
    for start in range(begin, ragged, BLOCK_N):
        sums, sums_rest = _grad_of_block(
            sums, sums_rest, queries, queries_rest, cotangent, cotangent_rest, lse, delta,
            k_ptr, v_ptr, grad_scores_ptr, rows_ptr, k_strides, v_strides, score_strides,
            image, rows, live, start, end, head, num_heads, num_queries, score_scale,
            grad_ptr is not None, GATHER, HEAD_DIM, DIM, REST, BLOCK_M, BLOCK_N, False, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    if ragged < end:
        sums, sums_rest = _grad_of_block(
            sums, sums_rest, queries, queries_rest, cotangent, cotangent_rest, lse, delta,
            k_ptr, v_ptr, grad_scores_ptr, rows_ptr, k_strides, v_strides, score_strides,
            image, rows, live, ragged, end, head, num_heads, num_queries, score_scale,
            grad_ptr is not None, GATHER, HEAD_DIM, DIM, REST, BLOCK_M, BLOCK_N, True, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    store_or_zero(
        grad_q_ptr, sums * scale, sums_rest * scale, num_heads, image * num_queries + rows, live, stored, head,
        HEAD_DIM, DIM, REST,
    )  # fmt: skip


@triton.jit
def _find_keys(
    rows_ptr, counts_ptr, cu_seqlens_ptr, num_keys, num_queries, batch_size, tile,
    GATHER: tl.constexpr, BLOCK_N: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Image of a tile of keys, their rows, which of them are to be computed, which stored, and the image's number of queries."""
    if cu_seqlens_ptr is not None:
        first, _, end = find_tile(cu_seqlens_ptr, None, tile, batch_size, num_keys, BLOCK_N, IMAGES)
        image = image_of(cu_seqlens_ptr, first, batch_size, IMAGES)
        rows = first + tl.arange(0, BLOCK_N)
        live = rows < end
        stored = rows < tl.where(end > 0, end, num_keys)  # the tail's tiles have end 0
        count = tl.where(end > 0, num_queries, 0)
    else:
        tiles = tl.cdiv(num_queries, BLOCK_N)
        image = (tile // tiles).to(tl.int64)
        rows = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = rows < num_queries
        live = stored
        count = tl.load(counts_ptr + image)
        if GATHER:
            live = rows < count
            count = tl.where(tile % tiles * BLOCK_N < count, count, 0)
            rows = tl.load(rows_ptr + image * num_queries + rows, mask=stored, other=0)
    return image, rows, live, stored, count


@triton.jit
def _grad_of_keys(
    grad_k, grad_k_rest, grad_v, grad_v_rest, keys, keys_rest, values, values_rest,
    q_ptr, grad_ptr, grad_scores_ptr, lse_ptr, delta_ptr, rows_ptr, q_strides, grad_strides, score_strides,
    image, rows, live, start, count, head, num_heads, num_queries, score_scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M queries from ``start`` add to the gradients of a tile of keys; everything transposed, [keys, queries]."""
    query = start + tl.arange(0, BLOCK_M)
    inside = query < count
    if rows_ptr is not None:
        query = tl.load(rows_ptr + image * num_queries + query, mask=inside, other=0)
    queries, queries_rest = load_operand(
        q_ptr, q_strides, image, query, inside, head, HEAD_DIM, DIM, REST, MASKED, VECTOR
    )
    of_scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if grad_scores_ptr is not None:
        of_scores = _load_mean_scores(
            grad_scores_ptr, score_strides, rows[:, None], query[None, :], live[:, None] & inside[None, :], num_heads
        )
    if grad_ptr is not None:
        cotangent, cotangent_rest = load_operand(
            grad_ptr, grad_strides, image, query, inside, head, HEAD_DIM, DIM, REST, MASKED, VECTOR
        )
        place = (image * num_heads + head) * num_queries + query
        lse = tl.load(lse_ptr + place, mask=inside, other=0.0)
        lse = lse if NATURAL else lse * LOG2_E
        delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
        scores = dot_parts(keys, keys_rest, queries, queries_rest, REST, PRECISION) * score_scale
        grad_v, grad_v_rest, through_softmax = grad_of_values_and_scores(
            grad_v, grad_v_rest, scores, lse, delta, cotangent, cotangent_rest, values, values_rest, inside,
            REST, MASKED, NATURAL, PRECISION,
        )  # fmt: skip
        of_scores += through_softmax
    grad_k, grad_k_rest = add_product(
        grad_k, grad_k_rest, of_scores.to(queries.dtype), queries, queries_rest, REST, PRECISION
    )
    return grad_k, grad_k_rest, grad_v, grad_v_rest


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "batch_size"])
def grad_keys_kernel(
    grad_k_ptr, grad_v_ptr, q_ptr, k_ptr, v_ptr, grad_ptr, grad_scores_ptr, lse_ptr, delta_ptr,
    rows_ptr, counts_ptr, cu_seqlens_ptr, q_strides, k_strides, v_strides, grad_strides, score_strides,
    scale, score_scale, num_heads, num_queries, num_keys, batch_size,
    GATHER: tl.constexpr, FILL_TAIL: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IMAGES: tl.constexpr, VECTOR: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, [B, num_queries, H, D] or, ragged, [num_keys, H, D]. Grid: tiles of BLOCK_N keys * H."""
    head = tl.program_id(0) % num_heads
    image, rows, live, stored, count = _find_keys(
        rows_ptr, counts_ptr, cu_seqlens_ptr, num_keys, num_queries, batch_size, tl.program_id(0) // num_heads,
        GATHER, BLOCK_N, IMAGES,
    )  # fmt: skip
    score_scale = tl.cast(score_scale, tl.float32)
    keys, keys_rest = load_operand(k_ptr, k_strides, image, rows, live, head, HEAD_DIM, DIM, REST, True, VECTOR)
    values, values_rest = load_operand(v_ptr, v_strides, image, rows, live, head, HEAD_DIM, DIM, REST, True, VECTOR)
    grad_k, grad_k_rest = zero_sums(BLOCK_N, DIM, REST)
    grad_v, grad_v_rest = zero_sums(BLOCK_N, DIM, REST)
    ragged = count - count % BLOCK_M  # full blocks of queries need no mask
    for start in range(0, ragged, BLOCK_M):
        grad_k, grad_k_rest, grad_v, grad_v_rest = _grad_of_keys(
            grad_k, grad_k_rest, grad_v, grad_v_rest, keys, keys_rest, values, values_rest,
            q_ptr, grad_ptr, grad_scores_ptr, lse_ptr, delta_ptr, rows_ptr, q_strides, grad_strides, score_strides,
            image, rows, live, start, count, head, num_heads, num_queries, score_scale,
            HEAD_DIM, DIM, REST, BLOCK_M, BLOCK_N, False, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    if ragged < count:
        grad_k, grad_k_rest, grad_v, grad_v_rest = _grad_of_keys(
            grad_k, grad_k_rest, grad_v, grad_v_rest, keys, keys_rest, values, values_rest,
            q_ptr, grad_ptr, grad_scores_ptr, lse_ptr, delta_ptr, rows_ptr, q_strides, grad_strides, score_strides,
            image, rows, live, ragged, count, head, num_heads, num_queries, score_scale,
            HEAD_DIM, DIM, REST, BLOCK_M, BLOCK_N, True, VECTOR, NATURAL, PRECISION,
        )  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    place = rows.to(tl.int64)
    if cu_seqlens_ptr is None:
        place += image * num_queries
    elif not FILL_TAIL:
        stored = live
    store_or_zero(
        grad_k_ptr, grad_k * scale, grad_k_rest * scale, num_heads, place, live, stored, head, HEAD_DIM, DIM, REST
    )
    store_or_zero(grad_v_ptr, grad_v, grad_v_rest, num_heads, place, live, stored, head, HEAD_DIM, DIM, REST)
