"""Blocks of a matrix and vectors that meet their columns: loads in fp32, stores rounded to the matrix's dtype; sums of products."""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def load_block(x_ptr, strides, row, column, inside, width):
    """[ROWS, COLUMNS] in fp32; zeros in rows that are not inside and past the width."""
    address = x_ptr + row[:, None] * strides[0] + column.to(tl.int64)[None, :] * strides[1]
    return tl.load(address, mask=inside[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_vector(vector_ptr, stride, column, width):
    """[1, COLUMNS] in fp32; zeros past the width."""
    return tl.load(vector_ptr + column.to(tl.int64) * stride, mask=column < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def to_tf32(x):
    """The nearest tf32, ties away from zero, as in PyTorch's own products; matmul units cut bits off (triton-lang/triton issue 4574)."""
    if INTERPRETED:
        return x  # no assembly runs there, and products are of fp32
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """a @ b, and sums where there are some, in fp32. PRECISION of fp32: "ieee" or "tf32"; of 16 bits "ieee"."""
    if PRECISION == "tf32":
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def add_dot(sums, a, b, PRECISION: tl.constexpr):
    """sums + a @ b, of one step of a loop. Without tensor cores a product is a chain of sums, whose error grows with its length:
    there each step's starts at zero.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        # The last argument says nothing of fp32, but keeps Triton from making one chain of the two sums again.
        return sums + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return dot(a, b, sums, PRECISION)


@triton.jit
def store_block(out_ptr, value, row, column, inside, width):
    """[ROWS, COLUMNS] of a contiguous matrix, in the rows that are inside; rows int64."""
    address = out_ptr + row[:, None] * width + column[None, :]
    tl.store(address, value.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


@triton.jit
def zero_block(out_ptr, row, inside, width, COLUMNS: tl.constexpr):
    """Zeros in the rows that are inside, whatever the width."""
    zero = tl.zeros([row.shape[0], COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        store_block(out_ptr, zero, row, start + tl.arange(0, COLUMNS), inside, width)
