"""Rotary position embeddings: a table of sines and cosines once per stage, and one rotation kernel for q and k, forward and backward.

Equivalent PyTorch: ``reference/rope.py``. The table is fp32 [capacity, D]: rotating from it costs no sine in any block. Sines are our own,
since the library's slow path for large angles spills on Triton 3.6: whole turns and quarters come off exactly, a polynomial does the rest.
Bytes of a rotation: live rows of q and k read and written once, the table's once for every HEADS heads (from the L2 cache after the first).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .common.launch import OPTIONS, batch_of, ceil_div, on_device_of, power_of_2, stride
from .common.live_rows import live_count

# Not measured on a GPU yet. 4 warps.
ELEMENTS = 2048  # of a tile of one head: 16 a thread, two 16-byte loads of 16-bit numbers in flight
MOST_ROWS = 64
HEADS = 4  # a program's share of the heads: enough programs for a single image, and the table read once for eight tiles

TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def sine_and_cosine(turns):
    """Of 2 pi * turns, fp32, to about 1e-7; NaN for what is not finite. Polynomials on an eighth of a turn: Cephes' sinf and cosf."""
    turns -= tl.floor(turns + 0.5)
    quarter = tl.floor(4.0 * turns + 0.5)  # -2 to 2
    angle = (turns - 0.25 * quarter) * TWO_PI
    square = angle * angle
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * angle + angle
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cosine += 1.0 - 0.5 * square
    odd = (quarter == 1.0) | (quarter == -1.0)
    first, second = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    half = (quarter == 2.0) | (quarter == -2.0)
    first = tl.where(half | (quarter == -1.0), -first, first)
    second = tl.where(half | (quarter == 1.0), -second, second)
    return first, second


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def rope_table_kernel(
    out_ptr, cu_seqlens_ptr, cells_ptr, frequencies_ptr, phases_ptr,
    frequency_strides, phase_stride, batch_size, capacity, pairs,
    FILL_TAIL: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """out [capacity, 2 * pairs]. Grid: cdiv(capacity, ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < live_count(cu_seqlens_ptr, batch_size, capacity)
    stored = live
    if FILL_TAIL:
        stored = row < capacity
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs
    side = tl.load(cells_ptr + row * 4 + 3, mask=live, other=0)
    middle = (side - 1).to(tl.float32) * 0.5
    down = tl.load(cells_ptr + row * 4 + 1, mask=live, other=0).to(tl.float32) + middle
    right = tl.load(cells_ptr + row * 4 + 2, mask=live, other=0).to(tl.float32) + middle
    per_row = tl.load(frequencies_ptr + pair * frequency_strides[0], mask=inside, other=0.0)
    per_column = tl.load(frequencies_ptr + pair * frequency_strides[0] + frequency_strides[1], mask=inside, other=0.0)
    turns = down[:, None] * per_row[None, :] + right[:, None] * per_column[None, :]
    if phases_ptr is not None:
        turns += tl.load(phases_ptr + pair * phase_stride, mask=inside, other=0.0)[None, :]
    sine, cosine = sine_and_cosine(tl.where((side == 0)[:, None], 0.0, turns))
    cosine = tl.where(live[:, None], cosine, 0.0)
    address = out_ptr + row[:, None] * (2 * pairs) + pair[None, :]
    mask = stored[:, None] & inside[None, :]
    tl.store(address, sine, mask=mask)
    tl.store(address + pairs, cosine, mask=mask)


@triton.jit
def rotate_pairs(first, second, sine, cosine):
    """One rotation of each pair."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def rotate_heads(
    out_ptr, x_ptr, strides, row, live, stored, sine, cosine, first_head, heads, pairs,
    HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a [T, heads, 2 * pairs] tensor, from first_head on; rows that are stored but not live become zeros."""
    dtype = out_ptr.dtype.element_ty
    pair = tl.arange(0, PAIRS)
    column = tl.arange(0, 2 * PAIRS)
    for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
        source = x_ptr + row[:, None] * strides[0] + tl.cast(head, tl.int64) * strides[1]
        target = out_ptr + (row[:, None] * heads + head) * (2 * pairs)
        if HALF:
            mask = (pair < pairs)[None, :]
            near, far = source + pair[None, :] * strides[2], source + (pair + pairs)[None, :] * strides[2]
            first = tl.load(near, mask=live[:, None] & mask, other=0.0)
            second = tl.load(far, mask=live[:, None] & mask, other=0.0)
            first, second = rotate_pairs(first, second, sine, cosine)
            tl.store(target + pair[None, :], first.to(dtype), mask=stored[:, None] & mask)
            tl.store(target + (pair + pairs)[None, :], second.to(dtype), mask=stored[:, None] & mask)
        else:
            mask = (column < 2 * pairs)[None, :]
            both = tl.load(source + column[None, :] * strides[2], mask=live[:, None] & mask, other=0.0)
            first, second = tl.split(tl.reshape(both, (row.shape[0], PAIRS, 2)))
            first, second = rotate_pairs(first, second, sine, cosine)
            both = tl.reshape(tl.join(first, second), (row.shape[0], 2 * PAIRS))
            tl.store(target + column[None, :], both.to(dtype), mask=stored[:, None] & mask)


@triton.jit(do_not_specialize=["batch_size", "capacity", "q_heads", "k_heads"])
def rope_kernel(
    out_q_ptr, out_k_ptr, q_ptr, k_ptr, table_ptr, cu_seqlens_ptr,
    q_strides, k_strides, table_stride, batch_size, capacity, q_heads, k_heads, pairs,
    BACK: tl.constexpr, FILL_TAIL: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotate q and k by the table's angles, or BACK. Grid: cdiv(capacity, ROWS) * cdiv(most heads, HEADS), heads fastest."""
    shares = tl.cdiv(tl.maximum(q_heads, k_heads), HEADS)
    block = tl.program_id(0) // shares
    first_head = (tl.program_id(0) % shares) * HEADS
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    last = live_count(cu_seqlens_ptr, batch_size, capacity)
    live = row < last
    stored = live
    if FILL_TAIL:
        stored = row < capacity
        last = capacity
    if block * ROWS < last:  # nothing in a program of an undefined tail
        pair = tl.arange(0, PAIRS)
        address = table_ptr + row[:, None] * table_stride + pair[None, :]
        mask = live[:, None] & (pair < pairs)[None, :]
        sine = tl.load(address, mask=mask, other=0.0)
        cosine = tl.load(address + pairs, mask=mask, other=0.0)
        if BACK:
            sine = -sine
        rotate_heads(
            out_q_ptr, q_ptr, q_strides, row, live, stored, sine, cosine, first_head, q_heads, pairs, HALF, HEADS, PAIRS
        )
        rotate_heads(
            out_k_ptr, k_ptr, k_strides, row, live, stored, sine, cosine, first_head, k_heads, pairs, HALF, HEADS, PAIRS
        )


def rope_table(
    cu_seqlens: Tensor, cells: Tensor, frequencies: Tensor, phases: Tensor | None, fill_tail: bool
) -> Tensor:
    capacity, pairs = cells.shape[0], frequencies.shape[0]
    out = frequencies.new_empty(capacity, 2 * pairs)
    if out.numel() == 0:
        return out
    tiles = tile_sizes(pairs)
    with on_device_of(out):
        rope_table_kernel[(ceil_div(capacity, tiles["ROWS"]),)](
            out, cu_seqlens, cells, frequencies, phases,
            frequencies.stride(), stride(phases), cu_seqlens.shape[0] - 1, capacity, pairs,
            FILL_TAIL=fill_tail, **tiles, **OPTIONS,
        )  # fmt: skip
    return out


def ragged_rope(
    q: Tensor, k: Tensor, table: Tensor, cu_seqlens: Tensor | None, rotate_half: bool, fill_tail: bool
) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, table, cu_seqlens, back=False, rotate_half=rotate_half, fill_tail=fill_tail)


def ragged_rope_backward(
    grad_q: Tensor, grad_k: Tensor, table: Tensor, cu_seqlens: Tensor | None, rotate_half: bool
) -> tuple[Tensor, Tensor]:
    return _rotate(grad_q, grad_k, table, cu_seqlens, back=True, rotate_half=rotate_half, fill_tail=True)


def _rotate(
    q: Tensor, k: Tensor, table: Tensor, cu_seqlens: Tensor | None, *, back: bool, rotate_half: bool, fill_tail: bool
) -> tuple[Tensor, Tensor]:
    (capacity, q_heads, width), k_heads = q.shape, k.shape[1]
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    if capacity * width * max(q_heads, k_heads) == 0:
        return out_q, out_k
    tiles = tile_sizes(width // 2)
    grid = ceil_div(capacity, tiles["ROWS"]) * ceil_div(max(q_heads, k_heads), HEADS)
    with on_device_of(q):
        rope_kernel[(grid,)](
            out_q, out_k, q, k, table, cu_seqlens, q.stride(), k.stride(), table.stride(0),
            batch_of(cu_seqlens), capacity, q_heads, k_heads, width // 2,
            BACK=back, FILL_TAIL=fill_tail, HALF=rotate_half, HEADS=HEADS, **tiles, **OPTIONS,
        )  # fmt: skip
    return out_q, out_k


def tile_sizes(pairs: int) -> dict[str, int]:
    """Rows and pairs of channels of a program's tile."""
    padded = power_of_2(pairs)
    return {"ROWS": max(1, min(MOST_ROWS, ELEMENTS // (2 * padded))), "PAIRS": padded}
