"""Checks of values, on the host: what ``STEP_KERNELS_CHECK=1`` and ``SupertokenLayout.validate`` run, and on a CPU every op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import MAX_SIDE, SIDES


def validate_layout(cu_seqlens: Tensor, cells: Tensor, grid: tuple[int, int], num_prefix: int, trimmed: bool) -> None:
    """Raise ValueError naming the first row that breaks one of the rules of ``SupertokenLayout``, whose fields these are."""
    cu_seqlens, cells = cu_seqlens.cpu().long(), cells.cpu().long()
    validate_lengths(cu_seqlens, cells.shape[0], num_prefix, trimmed)
    live = int(cu_seqlens[-1])
    _require(cells[live:].eq(0).all(1), cells[live:], live, "zeros in rows past the live count")
    image = torch.repeat_interleave(torch.arange(cu_seqlens.shape[0] - 1, device="cpu"), cu_seqlens.diff())
    position = torch.arange(live, device="cpu") - cu_seqlens[:-1][image]
    prefix = position < num_prefix
    cells = cells[:live]
    _require(cells[:, 0] == image, cells, 0, "the image whose segment of cu_seqlens holds the row")
    _require(~prefix | cells[:, 1:].eq(0).all(1), cells, 0, "[image, 0, 0, 0] for a prefix token")
    _validate_blocks(cells, prefix, image, grid)


def validate_cu_seqlens(name: str, cu_seqlens: Tensor, capacity: int) -> None:
    """Raise ValueError unless cu_seqlens starts at 0, never falls, and ends within capacity."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {values[0]}")
    if values != sorted(values):
        b = next(b for b in range(len(values)) if values[b + 1] < values[b])
        raise ValueError(f"{name}: expected to be monotone, got {values[b]} then {values[b + 1]} at entry {b}")
    if values[-1] > capacity:
        raise ValueError(f"{name}: expected to end within the capacity of {capacity} rows, got {values[-1]}")


def validate_lengths(cu_seqlens: Tensor, capacity: int, num_prefix: int, trimmed: bool) -> None:
    validate_cu_seqlens("cu_seqlens", cu_seqlens, capacity)
    if trimmed and int(cu_seqlens[-1]) != capacity:
        raise ValueError(
            f"trimmed: expected the live count to equal the capacity {capacity}, got {int(cu_seqlens[-1])}"
        )
    short = cu_seqlens.diff() < num_prefix
    if short.any():
        b = int(short.int().argmax())
        raise ValueError(
            f"cu_seqlens: expected at least num_prefix = {num_prefix} tokens for every image, "
            f"got {int(cu_seqlens[b + 1] - cu_seqlens[b])} for image {b}"
        )


def _validate_blocks(cells: Tensor, prefix: Tensor, image: Tensor, grid: tuple[int, int]) -> None:
    rows, cols = grid
    row, col, side = cells[:, 1], cells[:, 2], cells[:, 3]
    _require(prefix | torch.isin(side, side.new_tensor(SIDES)), cells, 0, "a side that is a power of two up to 64")
    step = side.clamp(min=1)
    _require(prefix | ((row % step == 0) & (col % step == 0)), cells, 0, "a block aligned to its side")
    inside = (row >= 0) & (col >= 0) & (row + side <= rows) & (col + side <= cols)
    _require(prefix | inside, cells, 0, f"a block inside the grid {grid}")
    key = torch.where(prefix, -1, row * cols + col) + image * rows * cols
    rising = torch.ones_like(prefix)
    rising[1:] = prefix[1:] | (key[1:] > key[:-1])
    _require(rising, cells, 0, "an image's blocks in raster order of their top-left cells")
    covered = prefix.new_zeros(int(image.max()) + 1 if image.numel() else 0, rows, cols)
    for index in (~prefix).nonzero().flatten().tolist():
        b, r, c, s = cells[index].tolist()
        block = covered[b, r : r + s, c : c + s]
        if block.any():
            raise ValueError(f"cells[{index}]: expected no overlap with an earlier block, got {[b, r, c, s]}")
        block.fill_(True)


def _require(holds: Tensor, cells: Tensor, offset: int, expected: str) -> None:
    if not holds.all():
        index = int((~holds).int().argmax())
        raise ValueError(f"cells[{index + offset}]: expected {expected}, got {cells[index].tolist()}")


def validate_sides(sides: Tensor) -> None:
    """Raise ValueError naming the first cell, in raster order, that lies in no aligned block of its side."""
    if sides.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a graph cannot read values
    _, rows, cols = sides.shape
    right = sides == 0
    for side in SIDES:
        whole = sides[:, : rows // side * side, : cols // side * side] == side
        if not whole.numel():
            break
        blocks = whole.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        full = blocks.all(4, keepdim=True).all(2, keepdim=True).expand_as(blocks)
        right[:, : whole.shape[1], : whole.shape[2]] |= full.flatten(3, 4).flatten(1, 2)
    wrong = (~right).nonzero()
    if len(wrong):
        image, row, col = wrong[0].tolist()
        raise ValueError(
            f"sides: expected every cell to lie in an aligned block, inside the grid, whose cells all hold its side "
            f"(a power of two up to {MAX_SIDE}; 0 = uncovered); the first that does not is image {image}, "
            f"row {row}, column {col} with side {int(sides[image, row, col])}"
        )


def validate_max_seqlen(cu_seqlens: Tensor, max_seqlen: int) -> None:
    """max_seqlen bounds every image's tokens."""
    longest = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least {longest}, the longest image of cu_seqlens, got {max_seqlen}")


def validate_statistic(name: str, values: Sequence[float], *, of_bytes: bool) -> None:
    """Finite means, positive deviations; of uint8 images, which are divided by 255 first, both in 0 to 1."""
    numbers = [float(value) for value in values]
    positive = name == "std"
    if not all(abs(x) < math.inf and (x > 0 or not positive) and (0 <= x <= 1 or not of_bytes) for x in numbers):
        wanted = f"{'positive' if positive else 'finite'} numbers"
        reason = " in 0 to 1, as uint8 images are divided by 255 first" if of_bytes else ""
        raise ValueError(f"{name}: expected {wanted}{reason}, got {numbers}")
