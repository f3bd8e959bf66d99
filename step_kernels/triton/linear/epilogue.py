"""What follows the sums of a linear layer's tile, in fp32 and in PyTorch's order: bias, GELU, LayerScale, residual; one rounding at the end.

Exact GELU is x Phi(x). With fp32 results Phi comes from tl.erf, as PyTorch's does. With 16-bit results that would cost 31 instructions an
element, on multiprocessors whose matmul units wait meanwhile; a polynomial takes 15 and needs fewer registers (see ``gelu_of_16_bits``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.matrix import load_vector

SQRT_HALF = tl.constexpr(0.7071067811865476)
MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
TANH_SLOPE = tl.constexpr(-2.302208198191872)  # -2 sqrt(2 / pi) log2(e)
TANH_CUBE = tl.constexpr(0.044715)


@triton.jit
def gelu_of_32_bits(x):
    """x Phi(x), Phi by tl.erf."""
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def gelu_of_16_bits(x):
    """x Phi(x), where Phi(-|x|) exp(x^2 / 2) is a polynomial of |x|: Phi is off by at most 1.4e-5, a hundredth of a rounding to bf16.

    Weighted minimax fit on [0, 5.5]: relative error 3e-5 near 0, below 1e-3 up to 4. Further out PyTorch's own 1 + erf has no digits left.
    No quotient, and no difference from 1 where x is negative: small results keep their digits.
    """
    u = tl.minimum(tl.abs(x), 5.5)
    tail = 0.04570578084921133 + u * (-0.012196877810620347 + u * (0.0021054120891353806 + u * (-0.00020719682515881838 + u * 8.742075982250453e-06)))  # fmt: skip
    tail = 0.4999866337328313 + u * (-0.3983510948685557 + u * (0.24575228323336318 + u * (-0.12120685409377596 + u * tail)))  # fmt: skip
    tail *= tl.exp2(x * x * MINUS_HALF_LOG2_E)
    return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def gelu_tanh(x):
    """x / 2 (1 + tanh(y)) = x / (1 + exp(-2 y)), where y = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x / (1.0 + tl.exp2((x + x * x * x * TANH_CUBE) * TANH_SLOPE))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    """The activation by name; WIDE: for fp32 results."""
    if ACTIVATION == "gelu" and WIDE:
        return gelu_of_32_bits(x)
    elif ACTIVATION == "gelu":
        return gelu_of_16_bits(x)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh(x)
    else:
        return x


@triton.jit
def finish(
    sums, bias_ptr, gamma_ptr, residual, vector_strides, residual_stride, first_row, first_column, live, outputs,
    ACTIVATION: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Everything between the sums of a tile and its rounding, fp32 [ROWS, COLUMNS]; by TMA ``residual`` is a descriptor."""
    column = first_column + tl.arange(0, COLUMNS)
    if bias_ptr is not None:
        sums += load_vector(bias_ptr, vector_strides[0], column, outputs)
    sums = activate(sums, ACTIVATION, WIDE)
    if gamma_ptr is not None:
        sums *= load_vector(gamma_ptr, vector_strides[1], column, outputs)
    if residual is not None:
        if TMA:
            sums += residual.load([first_row, first_column]).to(tl.float32)
        else:
            row = first_row + tl.arange(0, ROWS)
            address = residual + row.to(tl.int64)[:, None] * residual_stride + column[None, :]
            sums += tl.load(address, mask=(row < live)[:, None] & (column < outputs)[None, :], other=0.0).to(tl.float32)
    return sums
