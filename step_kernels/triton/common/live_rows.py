"""The live row count as kernels read it, and matrices with their tails zeroed, for PyTorch's own kernels that work on whole matrices.

Equivalent PyTorch: ``torch.where(torch.arange(capacity)[:, None] < cu_seqlens[-1], x, 0)``. Bytes: live rows read once, all rows written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, ceil_div, on_device_of, power_of_2

# Not measured on a GPU yet. 4 warps: two to four 16-byte loads in flight per thread.
COPY_ELEMENTS = 4096
COPY_COLUMNS = 1024


@triton.jit
def within(row, capacity):
    """A row's number that cu_seqlens tells, kept to the rows there are: whatever stands there, memory beside them is not touched."""
    return tl.minimum(tl.maximum(row, 0), capacity)


@triton.jit
def live_count(cu_seqlens_ptr, batch_size, capacity):
    """Rows that hold tokens: the last entry of cu_seqlens; without one, all."""
    live = capacity
    if cu_seqlens_ptr is not None:
        live = within(tl.load(cu_seqlens_ptr + batch_size), capacity)
    return live


@triton.jit
def rows_of(cu_seqlens_ptr, image, capacity):
    """First row and end of an image's tokens."""
    begin = within(tl.load(cu_seqlens_ptr + image), capacity)
    end = within(tl.load(cu_seqlens_ptr + image + 1), capacity)
    return begin, end


@triton.jit
def image_of(cu_seqlens_ptr, row, batch_size, IMAGES: tl.constexpr):
    """The image that a live row belongs to: how many end before it, of any other row the last image at most."""
    image = 0
    for start in range(0, batch_size, IMAGES):
        index = start + tl.arange(0, IMAGES)
        stop = tl.load(cu_seqlens_ptr + index + 1, mask=index < batch_size, other=0)
        image += tl.sum(((index < batch_size) & (stop <= row)).to(tl.int32), 0)
    return tl.cast(tl.minimum(image, batch_size - 1), tl.int64)


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def zero_tail_kernel(
    out_ptr, x_ptr, cu_seqlens_ptr, x_strides, batch_size, capacity, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [capacity, width]: x's live rows, then zeros. Grid: cdiv(capacity, ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < live_count(cu_seqlens_ptr, batch_size, capacity)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = (column < width)[None, :]
        address = x_ptr + row[:, None] * x_strides[0] + column[None, :] * x_strides[1]
        value = tl.load(address, mask=live[:, None] & inside, other=0.0)
        tl.store(out_ptr + row[:, None] * width + column[None, :], value, mask=(row < capacity)[:, None] & inside)


def zero_past_live_rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A contiguous copy of x [capacity, D], of any strides, whose rows past the live count are zeros; those of x are not read."""
    capacity, width = x.shape
    out = x.new_empty(capacity, width)
    if out.numel() == 0:
        return out
    columns = min(COPY_COLUMNS, power_of_2(width))
    rows = max(1, COPY_ELEMENTS // columns)
    with on_device_of(x):
        zero_tail_kernel[(ceil_div(capacity, rows),)](
            out, x, cu_seqlens, x.stride(), cu_seqlens.shape[0] - 1, capacity, width,
            ROWS=rows, COLUMNS=columns, **OPTIONS,
        )  # fmt: skip
    return out
