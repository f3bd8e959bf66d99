"""The tile schedule: which rows each attention program works on, longest image first. One kernel, no sort, no atomics, no host sync.

Equivalent PyTorch: ``reference/attention.py``. The programs of a GPU's last, partly filled wave should have little left to do: so tiles
whose images are long, and take longest, come first. A tile's place follows from counting the tiles of images that go before its own.
Bytes: cu_seqlens once per image (from the L2 cache), the schedule once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.live_rows import live_count, within
from ..common.tiles import tail_row

BLOCK = 256  # images compared, and entries written, at a time; not measured on a GPU yet
NUM_WARPS = 4


@triton.jit(do_not_specialize=["batch_size", "num_rows", "num_entries"])
def attention_schedule_kernel(
    schedule_ptr, cu_seqlens_ptr, batch_size, num_rows, num_entries, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """schedule [num_entries, 4]: the entries of one image, and its share of those past the last tile. Grid: max(B, 1)."""
    image = tl.program_id(0)
    programs = tl.num_programs(0)
    exists = image < batch_size
    begin = within(tl.load(cu_seqlens_ptr + image, mask=exists, other=0), num_rows)
    end = within(tl.load(cu_seqlens_ptr + image + 1, mask=exists, other=0), num_rows)
    length = tl.maximum(end - begin, 0)
    before = 0
    total = 0
    for start in range(0, batch_size, BLOCK):
        other = start + tl.arange(0, BLOCK)
        left = tl.load(cu_seqlens_ptr + other, mask=other < batch_size, other=0)
        right = tl.load(cu_seqlens_ptr + other + 1, mask=other < batch_size, other=0)
        rival = tl.maximum(within(right, num_rows) - within(left, num_rows), 0)
        count = tl.cdiv(rival, TILE)
        precedes = (rival > length) | ((rival == length) & (other < image))
        before += tl.sum(tl.where(precedes, count, 0), 0)
        total += tl.sum(count, 0)
    count = tl.cdiv(length, TILE)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = (index < count) & (before + index < num_entries)  # images of wrong cu_seqlens may overlap
        _store_entries(schedule_ptr, before + index, begin + index * TILE, begin, end, image, mask)
    live = live_count(cu_seqlens_ptr, batch_size, num_rows)
    share = tl.cdiv(num_entries - total, programs)
    for start in range(0, share, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        index = image * share + offset
        mask = (offset < share) & (index < num_entries - total)
        _store_entries(schedule_ptr, total + index, tail_row(live, index, num_rows, TILE), 0, 0, -1, mask)


@triton.jit
def _store_entries(schedule_ptr, entry, first, begin, end, image, mask):
    """Rows (first row of the tile, first row and end of its image, image) of the schedule."""
    address = schedule_ptr + entry.to(tl.int64) * 4
    zero = tl.zeros_like(entry)
    tl.store(address, first, mask=mask)
    tl.store(address + 1, zero + begin, mask=mask)
    tl.store(address + 2, zero + end, mask=mask)
    tl.store(address + 3, zero + image, mask=mask)
