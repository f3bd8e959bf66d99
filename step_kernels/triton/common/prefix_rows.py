"""Gradient of prefix tokens that every image shares: the sum over images of their rows. One kernel, summed in a fixed order.

Equivalent PyTorch: ``grad[prefix_rows(cu_seqlens, num_prefix)].sum(0)`` of ``reference/cells.py``. Bytes: those rows once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, ceil_div, on_device_of, power_of_2

# Not measured on a GPU yet; a handful of rows.
IMAGES = 16  # partial sums kept side by side
CHANNELS = 128


@triton.jit(do_not_specialize=["batch_size", "num_rows"])
def sum_prefix_rows_kernel(
    out_ptr, grad_ptr, cu_seqlens_ptr, row_stride, column_stride, batch_size, num_rows, width,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [num_prefix, width]. Grid: num_prefix * cdiv(width, BLOCK_C), channels fastest."""
    channel_blocks = tl.cdiv(width, BLOCK_C)
    position = tl.program_id(0) // channel_blocks
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    partial = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(0, batch_size, BLOCK_B):
        image = first + tl.arange(0, BLOCK_B)
        inside = image < batch_size
        row = tl.load(cu_seqlens_ptr + image, mask=inside, other=0) + position
        address = row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * column_stride
        inside = inside & (row >= 0) & (row < num_rows)  # whatever stands in cu_seqlens
        mask = inside[:, None] & (channel < width)[None, :]
        partial += tl.load(grad_ptr + address, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(partial, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + position.to(tl.int64) * width + channel, total, mask=channel < width)


def sum_prefix_rows(grad: Tensor, cu_seqlens: Tensor, num_prefix: int) -> Tensor:
    """[num_prefix, D]: the sum over images of each prefix token's row of ``grad`` [capacity, D], any strides."""
    width = grad.shape[1]
    out = grad.new_empty(num_prefix, width)
    if out.numel() == 0:
        return out
    block_c = min(power_of_2(width), CHANNELS)
    with on_device_of(grad):
        sum_prefix_rows_kernel[(num_prefix * ceil_div(width, block_c),)](
            out, grad, cu_seqlens, *grad.stride(), cu_seqlens.shape[0] - 1, grad.shape[0], width,
            BLOCK_B=IMAGES, BLOCK_C=block_c, **OPTIONS,
        )  # fmt: skip
    return out
