"""Gradient of prefix tokens: the sum over images of their rows where images share them, else the rows. One kernel, summed in a fixed order.

Equivalent PyTorch: ``grad[prefix_rows(cu_seqlens, num_prefix)]`` of ``reference/cells.py``, shared ``.sum(0)``. Bytes: those rows once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, ceil_div, on_device_of, power_of_2

# Not measured on a GPU yet; a handful of rows.
IMAGES = 16  # partial sums kept side by side
CHANNELS = 128


@triton.jit(do_not_specialize=["images", "num_prefix", "num_rows"])
def sum_prefix_rows_kernel(
    out_ptr, grad_ptr, cu_seqlens_ptr, row_stride, column_stride, images, num_prefix, num_rows, width,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [groups of ``images`` images, num_prefix, width]. Grid: groups * num_prefix * cdiv(width, BLOCK_C), channels fastest."""
    channel_blocks = tl.cdiv(width, BLOCK_C)
    out_row = tl.program_id(0) // channel_blocks
    group, position = out_row // num_prefix, out_row % num_prefix
    end = (group + 1) * images
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    partial = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for first in range(group * images, end, BLOCK_B):
        image = first + tl.arange(0, BLOCK_B)
        inside = image < end
        row = tl.load(cu_seqlens_ptr + image, mask=inside, other=0) + position
        address = row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * column_stride
        inside = inside & (row >= 0) & (row < num_rows)  # whatever stands in cu_seqlens
        mask = inside[:, None] & (channel < width)[None, :]
        partial += tl.load(grad_ptr + address, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(partial, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row.to(tl.int64) * width + channel, total, mask=channel < width)


def sum_prefix_rows(grad: Tensor, cu_seqlens: Tensor, num_prefix: int, per_image: bool = False) -> Tensor:
    """[num_prefix, D]: the sum over images of each prefix token's row of ``grad`` [capacity, D], any strides; or all, [B, num_prefix, D]."""
    width, batch_size = grad.shape[1], cu_seqlens.shape[0] - 1
    out = grad.new_empty((batch_size, num_prefix, width) if per_image else (num_prefix, width))
    if out.numel() == 0:
        return out
    block_c = min(power_of_2(width), CHANNELS)
    with on_device_of(grad):
        sum_prefix_rows_kernel[(out.numel() // width * ceil_div(width, block_c),)](
            out, grad, cu_seqlens, *grad.stride(), 1 if per_image else batch_size, num_prefix, grad.shape[0], width,
            BLOCK_B=1 if per_image else IMAGES, BLOCK_C=block_c, **OPTIONS,
        )  # fmt: skip
    return out
