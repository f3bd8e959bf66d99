"""The running softmax of attention and its gradient, on one block of queries and keys: what ragged and cross attention share.

Equivalent PyTorch: ``reference/attention.py``. Forward: a running maximum and sum (FlashAttention). Backward: the weights P again, from scores
and the saved log-sum-exp, then dS = P * (dP - delta) with delta = rowsum(out * grad).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .matrix import add_dot
from .tiles import add_product, dot_parts

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST = tl.constexpr(2.0**-126)  # of fp32's normal numbers: what scores below 2^100 are multiplied by to become zero


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """2^x or, where scores are in natural units, e^x.

    16-bit kernels hold scores in units of log2, which saves a multiplication per score; in fp32 the rounding of that change of units would
    be as large as all other errors of a weight.
    """
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def attend_keys(
    accumulator, accumulator_rest, total, maximum, q, q_rest, k, k_rest, v, v_rest, bias, valid, scale,
    REST: tl.constexpr, BIASED: tl.constexpr, masked, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys more: scores in the units of ``scale`` and ``bias``, then the running softmax.

    ``masked``, a constant or one of the GPU's: only to ``valid`` keys. The values of the others must be finite all the same.
    """
    scores = dot_parts(q, q_rest, k, k_rest, REST, PRECISION)  # [BLOCK_M, BLOCK_N]
    if masked:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    scale = tl.where(scale == 0.0, SMALLEST, scale)  # -inf times zero is NaN
    if BIASED:
        scores = scores * scale + bias[None, :]
        highest = tl.maximum(maximum, tl.max(scores, 1))
    else:  # scale > 0: the product moves into the exponent, one fused instruction per score
        highest = tl.maximum(maximum, tl.max(scores, 1) * scale)
    # Where all scores so far are -inf the weights are zero, not NaN: later keys may have finite scores.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    if BIASED:
        weights = exponential(scores - shift[:, None], NATURAL)
    else:
        weights = exponential(scores * scale - shift[:, None], NATURAL)
    faded = exponential(maximum - shift, NATURAL)
    total = total * faded + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    accumulator = add_dot(accumulator * faded[:, None], weights, v, PRECISION)
    if REST > 0:
        accumulator_rest = add_dot(accumulator_rest * faded[:, None], weights, v_rest, PRECISION)
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
def grad_of_scores(
    scores, lse, delta, cotangent, cotangent_rest, values, values_rest,
    REST: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of a block of scores [queries, keys]."""
    weights = exponential(scores - lse[:, None], NATURAL)
    grad_weights = dot_parts(cotangent, cotangent_rest, values, values_rest, REST, PRECISION)
    return weights * (grad_weights - delta[:, None])


@triton.jit
def grad_of_values_and_scores(
    grad_v, grad_v_rest, scores, lse, delta, cotangent, cotangent_rest, values, values_rest, inside,
    REST: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV of a tile of keys, one block of queries more, and dS of that block, transposed: [keys, queries]."""
    weights = exponential(scores - lse[None, :], NATURAL)
    if MASKED:  # a masked query is zero, and zero times a key's infinity is NaN
        weights = tl.where(inside[None, :], weights, 0.0)
    rounded = weights.to(cotangent.dtype)
    grad_v, grad_v_rest = add_product(grad_v, grad_v_rest, rounded, cotangent, cotangent_rest, REST, PRECISION)
    grad_weights = dot_parts(values, values_rest, cotangent, cotangent_rest, REST, PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    if MASKED:  # as zero times a value's
        grad_scores = tl.where(inside[None, :], grad_scores, 0.0)
    return grad_v, grad_v_rest, grad_scores
