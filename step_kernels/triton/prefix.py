"""Prefix tokens swapped for others: one kernel for tokens, cells and cu_seqlens, and the same kernel for the tokens' gradient.

Equivalent PyTorch: ``torch.cat([new_prefix, image_tokens[num_prefix:]])`` per image; see ``reference/prefix.py``. Every row of the result finds
its image by binary search in cu_seqlens, so each is written once and no fill comes first. The gradient is the same swap the other way
round, with zeros for the prefix tokens that went; that of the new prefix is a sum over images, unless each has its own.
Bytes: each row that stays read once, each row of the result written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import OPTIONS, ceil_div, on_device_of, power_of_2
from .common.live_rows import live_count
from .common.prefix_rows import sum_prefix_rows

# Not measured on a GPU yet.
ELEMENTS = 4096  # of one program, 4 warps: two to four 16-byte loads in flight per thread
COLUMNS = 1024
MAX_ROWS = 128  # for narrow tokens: one row per thread in the search


@triton.jit
def _images_of(row, cu_seqlens_ptr, batch_size, shift):
    """The last image that starts at or before each row [ROWS], where image b starts at cu_seqlens[b] + b * shift."""
    low = tl.zeros_like(row)
    high = low + batch_size
    span = batch_size
    # Halves the range, rounding up, until it is empty: ``low`` becomes the first image that starts later.
    while span > 0:
        middle = low + (high - low) // 2
        searching = low < high
        later = tl.load(cu_seqlens_ptr + middle, mask=searching, other=0) + middle * shift > row
        low = tl.where(searching & (later == 0), middle + 1, low)
        high = tl.where(searching & later, middle, high)
        span = span // 2
    return tl.maximum(low - 1, 0)


@triton.jit(do_not_specialize=["batch_size", "capacity", "out_prefix", "x_prefix", "out_shift", "x_shift"])
def swap_prefix_kernel(
    out_ptr, out_cells_ptr, out_cu_seqlens_ptr, x_ptr, prefix_ptr, cells_ptr, cu_seqlens_ptr,
    x_strides, prefix_strides, batch_size, capacity, width, out_prefix, x_prefix, out_shift, x_shift,
    FILL_TAIL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [capacity, width]: per image, out_prefix rows of ``prefix`` (zeros without), then x's rows behind its x_prefix first ones.

    Image b starts at cu_seqlens[b] + b * x_shift in x, at cu_seqlens[b] + b * out_shift in out. The third output is the starts of
    whichever of the two is shifted. Grid: cdiv(max(capacity, batch_size + 1), ROWS).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    starts = tl.load(cu_seqlens_ptr + row, mask=row <= batch_size, other=0) + row * (out_shift + x_shift)
    tl.store(out_cu_seqlens_ptr + row, starts.to(tl.int32), mask=row <= batch_size)
    shifted = tl.cast(batch_size, tl.int64) * out_shift
    live = row < live_count(cu_seqlens_ptr, batch_size, capacity - shifted) + shifted
    stored = row < capacity
    image = _images_of(row, cu_seqlens_ptr, batch_size, out_shift)
    begin = tl.load(cu_seqlens_ptr + image, mask=live, other=0)
    position = row - begin - image * out_shift
    source = begin + image * x_shift + x_prefix + position - out_prefix
    x_rows = capacity - shifted + tl.cast(batch_size, tl.int64) * x_shift
    # Bounds that hold by themselves but for wrong cu_seqlens.
    new = live & (position >= 0) & (position < out_prefix) & (image < batch_size)
    kept = live & (position >= out_prefix) & (source >= 0) & (source < x_rows)
    if out_cells_ptr is not None:
        field = tl.arange(0, 4)[None, :]
        cell = tl.load(cells_ptr + source[:, None] * 4 + field, mask=kept[:, None] & (field < 4), other=0)
        cell = tl.where(new[:, None] & (field == 0), image[:, None].to(tl.int32), cell)
        tl.store(out_cells_ptr + row[:, None] * 4 + field, cell, mask=stored[:, None] & (field < 4))
    if not FILL_TAIL:
        stored = live
    for start in range(0, tl.max(stored.to(tl.int32), 0) * width, COLUMNS):  # nothing in a program of an undefined tail
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        inside = column < width
        address = x_ptr + source[:, None] * x_strides[0] + column * x_strides[1]
        value = tl.load(address, mask=kept[:, None] & inside, other=0.0)
        if prefix_ptr is not None:
            at = image * prefix_strides[0] + position * prefix_strides[1]
            address = prefix_ptr + at[:, None] + column * prefix_strides[2]
            value = tl.where(new[:, None], tl.load(address, mask=new[:, None] & inside, other=0.0), value)
        tl.store(out_ptr + row[:, None] * width + column, value, mask=stored[:, None] & inside)


def replace_prefix(
    tokens: Tensor, cu_seqlens: Tensor, cells: Tensor, new_prefix: Tensor, old_prefix: int, fill_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    prefix = new_prefix.shape[-2]
    shift = prefix - old_prefix
    capacity = tokens.shape[0] + (cu_seqlens.shape[0] - 1) * shift
    out = tokens.new_empty(capacity, tokens.shape[1])
    new_cells, new_cu_seqlens = cells.new_empty(capacity, 4), torch.empty_like(cu_seqlens)
    _swap(
        out, new_cells, new_cu_seqlens, tokens, new_prefix, cells, cu_seqlens,
        prefixes=(prefix, old_prefix), shifts=(shift, 0), fill_tail=fill_tail,
    )  # fmt: skip
    return out, new_cu_seqlens, new_cells


def replace_prefix_backward(
    grad: Tensor, cu_seqlens: Tensor, capacity: int, prefix: int, old_prefix: int, per_image: bool
) -> tuple[Tensor, Tensor]:
    grad_tokens, new_cu_seqlens = grad.new_empty(capacity, grad.shape[1]), torch.empty_like(cu_seqlens)
    _swap(
        grad_tokens, None, new_cu_seqlens, grad, None, None, cu_seqlens,
        prefixes=(old_prefix, prefix), shifts=(0, prefix - old_prefix), fill_tail=True,
    )  # fmt: skip
    return grad_tokens, sum_prefix_rows(grad, new_cu_seqlens, prefix, per_image)


def _swap(
    out: Tensor,
    out_cells: Tensor | None,
    out_cu_seqlens: Tensor,
    x: Tensor,
    prefix: Tensor | None,
    cells: Tensor | None,
    cu_seqlens: Tensor,
    *,
    prefixes: tuple[int, int],
    shifts: tuple[int, int],
    fill_tail: bool,
) -> None:
    capacity, width = out.shape
    batch_size = cu_seqlens.shape[0] - 1
    columns = min(power_of_2(max(width, 1)), COLUMNS)
    strides = None if prefix is None else (0, *prefix.stride())[-3:]  # all images at 0 share one
    rows = min(max(ELEMENTS // columns, 1), MAX_ROWS)
    with on_device_of(out):
        swap_prefix_kernel[(ceil_div(max(capacity, batch_size + 1), rows),)](
            out, out_cells, out_cu_seqlens, x, prefix, cells, cu_seqlens,
            x.stride(), strides, batch_size, capacity, width, *prefixes, *shifts,
            FILL_TAIL=fill_tail, ROWS=rows, COLUMNS=columns, **OPTIONS,
        )  # fmt: skip
