"""Gradient of ``merge_patches``: one kernel, no atomics, no fill.

Equivalent PyTorch: ``reference/merge.py``. Runs per cell and finds the token that covers it, so that covered and uncovered pixels alike are
written once. Bytes: the patches' gradient once (more where a block spans programs, from L2), the images' gradient once, the layout.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.cells import central, number_of_sides, token_covering
from ..common.launch import OPTIONS, ceil_div, on_device_of, power_of_2, stride
from .patches import clamped

# Not measured on a GPU yet.
BACKWARD_TILE = 1024  # pixels at a time: each needs two 64-bit addresses
BACKWARD_CELLS = 8  # neighbouring cells of one program: runs of 128 pixels at p = 16, and enough programs to hide the search for tokens


@triton.jit(do_not_specialize=["capacity", "rows", "cols"])
def merge_patches_backward_kernel(
    grad_images_ptr, grad_ptr, std_ptr, cu_seqlens_ptr, cells_ptr, grad_stride, grad_column_stride, std_stride, capacity, rows, cols,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, BILINEAR: tl.constexpr, NUM_SIDES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """grad_images [B, CHANNELS, rows * PATCH, cols * PATCH], contiguous: the share of each pixel in its token's patch, zero without a token.

    Grid: B * rows * cdiv(cols, BLOCK_CELLS). Every pixel is written once. z counts pixel rows of the cells over all channels.
    """
    blocks_across = tl.cdiv(cols, BLOCK_CELLS)
    block = tl.program_id(0) // blocks_across
    image = block // rows
    row = block % rows
    col = tl.program_id(0) % blocks_across * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    inside = col < cols
    token = token_covering(cu_seqlens_ptr, cells_ptr, image, tl.zeros_like(col) + row, col, inside, capacity, NUM_SIDES)
    covered = token >= 0
    token = tl.where(covered, token, 0).to(tl.int64)
    token_row = tl.load(cells_ptr + token * 4 + 1, mask=covered, other=0)
    token_col = tl.load(cells_ptr + token * 4 + 2, mask=covered, other=0)
    side = tl.load(cells_ptr + token * 4 + 3, mask=covered, other=1)
    x = tl.arange(0, BLOCK_X)
    right = (col - token_col)[:, None] * PATCH + x[None, :]  # pixels from the token's left edge
    sampled = covered[:, None] & (x < PATCH)[None, :]
    written = inside[:, None] & (x < PATCH)[None, :]
    taps = side
    if BILINEAR:  # only the central 2 x 2 pixels of side x side were read
        sampled = sampled & central(right, side[:, None])
        taps = tl.minimum(side, 2)
    source = grad_ptr + token[:, None] * grad_stride + (right // side[:, None]).to(tl.int64) * grad_column_stride
    target = col[:, None] * PATCH + x[None, :]
    share = 1 / (taps * taps).to(tl.float32)  # exact: a power of two
    for first in range(0, CHANNELS * PATCH, BLOCK_Z):
        z = first + tl.arange(0, BLOCK_Z)
        in_rows = z < CHANNELS * PATCH
        channel, y = z // PATCH, z % PATCH
        down = (row - token_row)[None, :] * PATCH + y[:, None]
        read = in_rows[:, None] & covered[None, :]
        if BILINEAR:
            read = read & central(down, side[None, :])
        patch_row = channel[:, None] * PATCH + down // side[None, :]
        address = source[None, :, :] + (patch_row * PATCH).to(tl.int64)[:, :, None] * grad_column_stride
        value = tl.load(address, mask=read[:, :, None] & sampled[None, :, :], other=0.0).to(tl.float32)
        if std_ptr is not None:
            std = tl.load(std_ptr + channel * std_stride, mask=in_rows, other=1.0).to(tl.float32)
            value = tl.div_rn(value, tl.broadcast_to(std[:, None, None], value.shape))
        value = value * share[None, :, None]
        place = (image.to(tl.int64) * CHANNELS + channel) * rows * PATCH + row * PATCH + y
        address = grad_images_ptr + (place * cols * PATCH)[:, None, None] + target[None, :, :]
        mask = in_rows[:, None, None] & written[None, :, :]
        tl.store(address, value.to(grad_images_ptr.dtype.element_ty), mask=mask)


def merge_patches_backward(
    grad: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    image_shape: list[int],
    patch_size: int,
    bilinear: bool,
    std: Tensor | None,
) -> Tensor:
    batch_size, channels, height, width = image_shape
    rows, cols = height // patch_size, width // patch_size
    grad_images = grad.new_empty(image_shape)
    if grad_images.numel() == 0:
        return grad_images
    block_x = power_of_2(patch_size)
    block_cells = clamped(BACKWARD_TILE // block_x, BACKWARD_CELLS)
    block_z = clamped(BACKWARD_TILE // (block_x * block_cells), power_of_2(channels * patch_size))
    with on_device_of(grad):
        merge_patches_backward_kernel[(batch_size * rows * ceil_div(cols, block_cells),)](
            grad_images, grad, std, cu_seqlens, cells, *grad.stride(), stride(std), cells.shape[0], rows, cols,
            CHANNELS=channels, PATCH=patch_size, BILINEAR=bilinear, NUM_SIDES=number_of_sides(rows, cols),
            BLOCK_CELLS=block_cells, BLOCK_Z=block_z, BLOCK_X=block_x, **OPTIONS,
        )  # fmt: skip
    return grad_images
