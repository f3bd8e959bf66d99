"""Pixels of supertokens: ``merge_patches``, one kernel. Its gradient: ``backward.py``.

Equivalent PyTorch: ``reference/merge.py``. Runs per token and reads each pixel once; a large token is shared out among programs that belong
to the cells it covers, so that no program reads more than about six tiles of pixels.
Bytes: the images once (bilinear: the sectors that hold the central pixels), the patches [capacity, C * p * p] once, the layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import SIDES
from ..common import tuned
from ..common.cells import number_of_sides, token_covering
from ..common.launch import OPTIONS, ceil_div, on_device_of, power_of_2, stride
from ..common.live_rows import live_count

# Not measured on a GPU yet. The first row runs where `tune` has measured none; the others are its candidates.
# Pixels loaded at a time, 16 a thread (one output of side 64 takes 4096): twice that spilled on sm_86 and sm_89. Tiles that one program reads,
# as of a token of side 4 at p = 16; a token of more is shared out. Programs that walk the rows: a few waves; one per row would launch mostly
# idle ones where capacity exceeds the live count. Warps.
MERGE_ROWS = (2048, 6, 8192, 4), (2048, 3, 16384, 4), (2048, 12, 4096, 4), (1024, 12, 8192, 4)
ZERO_BLOCK = 1024
SCATTERED_TILE = 1024  # pixels at a time where each needs a 64-bit address of its own: bilinear


@triton.jit(do_not_specialize=["batch_size", "capacity", "rows", "cols", "large_programs", "row_programs"])
def merge_patches_kernel(
    out_ptr, images_ptr, mean_ptr, std_ptr, cu_seqlens_ptr, cells_ptr, strides, mean_stride, std_stride,
    batch_size, capacity, rows, cols, large_programs, row_programs,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, BILINEAR: tl.constexpr, FILL_TAIL: tl.constexpr,
    NUM_SIDES: tl.constexpr, SMALL_SIDES: tl.constexpr, SHARES: tl.constexpr,
    NUM_TILES: tl.constexpr, TILE_Z: tl.constexpr, TILE_X: tl.constexpr, ZERO_BLOCK: tl.constexpr,
):  # fmt: skip
    """out [capacity, CHANNELS * PATCH * PATCH]. Grid: large_programs + row_programs.

    The first programs take one share each of the large tokens; the others walk the rows: tokens of the SMALL_SIDES smallest sides, prefix, tail.
    """
    program = tl.program_id(0)
    images = (images_ptr, strides)
    statistics = (mean_ptr, std_ptr, mean_stride, std_stride)
    if program < large_programs:
        token, side, share, num_shares = _share_of_large_token(
            cu_seqlens_ptr, cells_ptr, program, capacity, rows, cols, NUM_SIDES, 1 << SMALL_SIDES, SHARES
        )
        _merge_token(
            out_ptr, images, statistics, cells_ptr, token, side, share, num_shares,
            CHANNELS, PATCH, BILINEAR, SMALL_SIDES, len(TILE_Z), NUM_TILES, TILE_Z, TILE_X,
        )  # fmt: skip
    else:
        live = live_count(cu_seqlens_ptr, batch_size, capacity)
        end = live
        if FILL_TAIL:
            end = capacity
        # What tokens share is computed anew for each: kept, that of all sides together would not fit the registers.
        for token in tl.range(program - large_programs, end, row_programs, disable_licm=True):
            side = tl.load(cells_ptr + tl.cast(token, tl.int64) * 4 + 3, mask=token < live, other=0)
            if side == 0:
                _zero_row(out_ptr, token, CHANNELS * PATCH * PATCH, ZERO_BLOCK)
            _merge_token(
                out_ptr, images, statistics, cells_ptr, token, side, 0, 1,
                CHANNELS, PATCH, BILINEAR, 0, SMALL_SIDES, NUM_TILES, TILE_Z, TILE_X,
            )  # fmt: skip


@triton.jit
def _share_of_large_token(
    cu_seqlens_ptr, cells_ptr, program, capacity, rows, cols,
    NUM_SIDES: tl.constexpr, LARGE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Token, its side (0: no token), which of its shares this is, and of how many.

    Each aligned block of LARGE x LARGE cells has SHARES programs; a token has those of all blocks that it covers.
    """
    blocks_down, blocks_across = rows // LARGE, cols // LARGE
    block = program // SHARES
    row = block // blocks_across % blocks_down * LARGE
    col = block % blocks_across * LARGE
    image = block // blocks_across // blocks_down
    one = tl.full([1], 1, tl.int32)
    covering = token_covering(cu_seqlens_ptr, cells_ptr, image, one * row, one * col, one > 0, capacity, NUM_SIDES)
    token = tl.max(covering, 0)
    address = cells_ptr + token.to(tl.int64) * 4
    down = row - tl.load(address + 1, mask=token >= 0, other=0)
    right = col - tl.load(address + 2, mask=token >= 0, other=0)
    side = tl.load(address + 3, mask=token >= 0, other=0)
    across = side // LARGE
    share = (down // LARGE * across + right // LARGE) * SHARES + program % SHARES
    return token, side, share, across * across * SHARES


@triton.jit
def _merge_token(
    out_ptr, images, statistics, cells_ptr, token, side, share, num_shares,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, BILINEAR: tl.constexpr,
    FROM: tl.constexpr, UNTIL: tl.constexpr, NUM_TILES: tl.constexpr, TILE_Z: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Tiles share, share + num_shares, ... of a token whose side is one of 2^FROM, ..., 2^(UNTIL - 1); nothing for any other."""
    taps = side  # pixels averaged along an axis
    if BILINEAR:
        taps = tl.minimum(side, 2)
    for i in tl.static_range(FROM, UNTIL):
        if taps == (1 << i):
            cell = cells_ptr + tl.cast(token, tl.int64) * 4
            image, row, col = tl.load(cell), tl.load(cell + 1), tl.load(cell + 2)
            # Not range(share, NUM_TILES[i], num_shares): a step known at run time only would cost the loads their width.
            for turn in range(0, (NUM_TILES[i] - share + num_shares - 1) // num_shares):
                _merge_tile(
                    out_ptr, images, statistics, token, image, row, col, side, share + turn * num_shares,
                    CHANNELS, PATCH, BILINEAR, 1 << i, TILE_Z[i], TILE_X[i],
                )  # fmt: skip


@triton.jit
def _merge_tile(
    out_ptr, images, statistics, token, image, row, col, side, tile,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, BILINEAR: tl.constexpr,
    TAPS: tl.constexpr, TILE_Z: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Part of a token's patch: z counts its rows over all channels, x its columns. Pixels are loaded as [TILE_Z, TAPS, TILE_X * TAPS]."""
    images_ptr, strides = images
    tiles_across: tl.constexpr = (PATCH + TILE_X - 1) // TILE_X
    z = tile // tiles_across * TILE_Z + tl.arange(0, TILE_Z)
    first_x = tile % tiles_across * TILE_X
    channel, y = z // PATCH, z % PATCH
    tap = tl.arange(0, TAPS)
    across = tl.arange(0, TILE_X * TAPS)
    if BILINEAR:  # the central pixels of side x side
        down = y[:, None] * side + (side - TAPS) // 2 + tap[None, :]
        right = (first_x + across // TAPS) * side + (side - TAPS) // 2 + across % TAPS
    else:
        down = y[:, None] * TAPS + tap[None, :]
        right = first_x * TAPS + across
        # No change, as blocks are aligned to their side; but knowing it, the compiler widens the loads.
        col = col // TAPS * TAPS
    start = images_ptr + image.to(tl.int64) * strides[0]
    start += (row * PATCH).to(tl.int64) * strides[2] + (col * PATCH).to(tl.int64) * strides[3]
    address = channel.to(tl.int64)[:, None] * strides[1] + down.to(tl.int64) * strides[2]
    address = start + address[:, :, None] + (right.to(tl.int64) * strides[3])[None, None, :]
    in_rows = z < CHANNELS * PATCH
    mask = in_rows[:, None, None]
    if PATCH % TILE_X != 0:  # else a condition that always holds would only narrow the loads
        mask = mask & (first_x * TAPS + across < PATCH * TAPS)[None, None, :]
    pixels = tl.load(address, mask=mask, other=0)
    if TAPS == 1:  # not even a cast: what is not averaged or normalised is copied bit by bit
        value = tl.reshape(pixels, [TILE_Z, TILE_X])
    else:
        value = tl.reshape(tl.sum(pixels.to(tl.float32), 1), [TILE_Z, TILE_X, TAPS])
        value = tl.sum(value, 2) * (1 / (TAPS * TAPS))  # exact: a power of two
    value = _normalised(value, statistics, channel, in_rows, pixels.dtype == tl.uint8)
    x = first_x + tl.arange(0, TILE_X)
    address = out_ptr + tl.cast(token, tl.int64) * (CHANNELS * PATCH * PATCH) + z[:, None] * PATCH + x[None, :]
    tl.store(address, value.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (x < PATCH)[None, :])


@triton.jit
def _normalised(value, statistics, channel, inside, BYTES: tl.constexpr):
    """(value / 255 if bytes - mean) / std as the reference has it: in fp32, divisions rounded to nearest; without any of them, value as it is."""
    mean_ptr, std_ptr, mean_stride, std_stride = statistics
    if BYTES:
        value = tl.div_rn(value.to(tl.float32), tl.full(value.shape, 255.0, tl.float32))
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel * mean_stride, mask=inside, other=0.0).to(tl.float32)
        value = value.to(tl.float32) - mean[:, None]
    if std_ptr is not None:
        std = tl.load(std_ptr + channel * std_stride, mask=inside, other=1.0).to(tl.float32)
        value = tl.div_rn(value.to(tl.float32), tl.broadcast_to(std[:, None], value.shape))
    return value


@triton.jit
def _zero_row(out_ptr, token, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in one row of the output."""
    start = out_ptr + tl.cast(token, tl.int64) * WIDTH
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        tl.store(start + column, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=column < WIDTH)


def merge_patches(
    images: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    patch_size: int,
    bilinear: bool,
    mean: Tensor | None,
    std: Tensor | None,
    fill_tail: bool,
) -> Tensor:
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    return merge_patches_to(dtype, images, cu_seqlens, cells, patch_size, bilinear, mean, std, fill_tail)


def merge_patches_to(
    dtype: torch.dtype,
    images: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    patch_size: int,
    bilinear: bool,
    mean: Tensor | None,
    std: Tensor | None,
    fill_tail: bool,
) -> Tensor:
    """``merge_patches`` with an output of any dtype."""
    batch_size, channels, height, width = images.shape
    capacity, rows, cols = cells.shape[0], height // patch_size, width // patch_size
    out = images.new_empty(capacity, channels * patch_size**2, dtype=dtype)
    if out.numel() == 0:
        return out
    measured = None if bilinear else tuned.row(images.device, *row_key(images, patch_size))
    tile, most, walking, warps = measured or MERGE_ROWS[0]
    # Bilinear reads as many pixels of a token of any side above 1.
    tile = SCATTERED_TILE if bilinear else tile
    sides = (1, 2) if bilinear else tuple(side for side in SIDES if side <= min(rows, cols))
    counts, tile_z, tile_x = zip(*(_tiles(channels, patch_size, side, tile) for side in sides), strict=True)
    small_sides = len(sides) if bilinear else sum(count <= most for count in counts)
    large_programs, shares = 0, 1
    if small_sides < len(sides):
        large, shares = sides[small_sides], ceil_div(counts[small_sides], most)
        large_programs = batch_size * (rows // large) * (cols // large) * shares
    row_programs = min(capacity, walking)
    with on_device_of(images):
        merge_patches_kernel[(large_programs + row_programs,)](
            out, images, mean, std, cu_seqlens, cells, images.stride(), *(stride(x) for x in (mean, std)),
            batch_size, capacity, rows, cols, large_programs, row_programs,
            CHANNELS=channels, PATCH=patch_size, BILINEAR=bilinear, FILL_TAIL=fill_tail,
            NUM_SIDES=number_of_sides(rows, cols), SMALL_SIDES=small_sides, SHARES=shares,
            NUM_TILES=counts, TILE_Z=tile_z, TILE_X=tile_x, ZERO_BLOCK=ZERO_BLOCK, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return out


def row_key(images: Tensor, patch_size: int) -> tuple[object, ...]:
    return "merge_patches", images.element_size(), patch_size


def _tiles(channels: int, patch_size: int, side: int, tile: int) -> tuple[int, int, int]:
    """How many tiles of ``tile`` pixels make a token of that side; the patch rows (over all channels) and columns of one."""
    outputs = tile // side**2
    x = clamped(outputs, power_of_2(patch_size))
    z = clamped(outputs // x, power_of_2(channels * patch_size))
    return ceil_div(channels * patch_size, z) * ceil_div(patch_size, x), z, x


def clamped(value: int, most: int) -> int:
    return max(1, min(value, most))
