"""Tiles of the linear layer's matmul per (architecture class, precision), and the choice among them. None is measured on a GPU yet.

Chosen ahead of time, so that no epilogue spills and shared memory fits every chip of the class. The widest tile of a class reads least per
FLOP; the narrower ones are for token counts whose wide tiles would leave multiprocessors idle (64 rows is the least that wgmma takes).
Share of 132 multiprocessors' products that a layer of 1024 outputs leaves unused or spends on rows that do not exist, by arithmetic:

    live rows      300   640  1640  5000  13000  50000
    128 x 256     93 %  85 %  61 %  41 %   23 %    1 %
    128 x 128     86 %  70 %  22 %  21 %   12 %    1 %
     64 x 128     72 %  39 %  22 %   5 %    5 %    1 %
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..common.launch import architecture_class, ceil_div, input_precision


class Tiles(NamedTuple):
    """A program's tile of the output, the inputs of one step, and how it runs."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int
    parts: int = 1  # pieces of the tile that the epilogue takes one after another; 2 where one would spill
    resident: int = 1  # programs that a multiprocessor holds at a time
    flatten: bool = True  # one loop over tiles and inputs, so that loads run ahead into the next tile


_FLOAT = (Tiles(64, 64, 32, 4, 3, resident=2, flatten=False),)  # "ieee": no tensor cores, 32 sums a thread
_WIDE = (Tiles(128, 256, 64, 8, 3, parts=2), Tiles(128, 128, 64, 8, 4), Tiles(64, 128, 64, 4, 3, resident=2))
TILES: dict[tuple[str, str], tuple[Tiles, ...]] = {
    ("hopper", "half"): _WIDE,
    ("blackwell", "half"): _WIDE,
    ("ampere", "half"): (
        Tiles(128, 256, 32, 8, 4, parts=2),
        Tiles(128, 128, 32, 8, 4),
        Tiles(64, 128, 64, 4, 4, resident=2),
    ),
    ("consumer", "half"): (
        Tiles(128, 128, 32, 8, 3),
        Tiles(64, 128, 32, 8, 3, resident=2),  # 4 warps spill 8 bytes on sm_120 (Triton 3.6.0)
    ),
    ("hopper", "tf32"): (Tiles(128, 128, 32, 8, 3, flatten=False), Tiles(64, 128, 32, 8, 3, flatten=False)),
    ("blackwell", "tf32"): (Tiles(64, 128, 32, 8, 3, flatten=False),),
    ("ampere", "tf32"): (Tiles(64, 128, 32, 8, 3, flatten=False),),
    ("consumer", "tf32"): (Tiles(64, 64, 32, 4, 3, resident=2, flatten=False),),
    **{(name, "ieee"): _FLOAT for name in ("hopper", "blackwell", "ampere", "consumer")},
}
# Rows beside these, to be measured. Two programs: one's epilogue under the other's matmuls. They may take 128 registers a thread of 8 warps, or
# 255 of 4, with each epilogue of a block, and with all that there is still spill nothing (Triton 3.6.0 to 3.9.0).
CANDIDATES: dict[tuple[str, str], tuple[Tiles, ...]] = {
    ("hopper", "half"): (
        # 111 to 128; 132 with gamma (Triton 3.6.0), where the second program waits for the first. Of 4 warps it spills 56 bytes.
        Tiles(128, 128, 64, 8, 3, parts=2, resident=2),
        Tiles(64, 256, 32, 4, 4, parts=2, resident=2),  # 168 to 254; no two warpgroups that wait for each other
        Tiles(64, 128, 64, 4, 4, resident=2),  # the narrowest row with one more step under way
    ),
    # 142 to 186. Of 8 warps it spills 8 bytes (Triton 3.6.0); both programs' sums, each twice, are all of tensor memory.
    ("blackwell", "half"): (Tiles(128, 128, 64, 4, 3, parts=2, resident=2),),
    ("ampere", "half"): (
        Tiles(128, 128, 32, 4, 4, parts=2, resident=2),  # 205 to 241; of 8 warps up to 155: one program
        Tiles(128, 256, 64, 8, 3, parts=2),  # 240 to 252; half as many steps, and waits, as the widest row
    ),
    ("consumer", "half"): (
        Tiles(128, 128, 32, 4, 3, parts=2, resident=2),  # 203 to 250; of 8 warps 130 and more on sm_120
        Tiles(128, 128, 64, 8, 3),  # 127 to 201; half as many steps, 96 KiB
        Tiles(128, 256, 32, 8, 3, parts=2),  # 203 to 250; reads a quarter less per product than the widest row
    ),
}
# Where rows of any operand do not start at multiples of 16 elements, it is loaded or stored an element at a time, through addresses and
# registers of which wider tiles take too many.
UNALIGNED = {
    **dict.fromkeys(("half", "tf32"), Tiles(64, 64, 32, 8, 3, resident=2, flatten=False)),
    # Every other shape spills 8 bytes and more on some chip.
    "ieee": Tiles(32, 64, 32, 8, 3, resident=2, flatten=False),
}
# Products that a multiprocessor's matmul units form while one element arrives from the L2 cache; a tile's elements are used rows * columns /
# (rows + columns) times, 43 in the narrowest and 85 in the widest. A rough guess: fp16 products per clock are data sheets' (1024, 2048, 4096 and,
# on consumer chips, 256); the A100's L2 cache gives 5120 bytes per clock, taken for every data-centre chip, and consumer chips' about
# 16 bytes per multiprocessor. tf32 halves products and elements alike.
PRODUCTS_PER_LOAD = {"ampere": 43, "hopper": 106, "blackwell": 237, "consumer": 32}
GROUP = 8  # tiles of rows that are worked off together: 132 programs of the widest tile then read about 8 + 17 stripes


def candidates(architecture: int, precision: str) -> tuple[Tiles, ...]:
    """Rows to be measured."""
    name = architecture_class(architecture), precision
    return (*TILES[name], *CANDIDATES.get(name, ()))


def precision_of(dtype: torch.dtype) -> str:
    """How products are formed: "half", or torch's own setting for fp32: "ieee" or "tf32"."""
    return input_precision(dtype) if dtype == torch.float32 else "half"


@functools.lru_cache
def choose_tiles(architecture: int, precision: str, rows: int, columns: int, multiprocessors: int) -> Tiles:
    """The tiles that leave the busiest multiprocessor the least work; the widest of equals.

    Args:
        architecture: compute capability times ten.
        precision: as ``precision_of`` says.
        rows: of the output, as many as are expected to be live; the capacity where nothing better is known.
        columns: of the output.
        multiprocessors: of the GPU.
    """
    name = architecture_class(architecture)

    def work(tiles: Tiles) -> int:
        """Per input, in products; the sum of products and loads, since what overlaps still shares registers, power and the cache."""
        count = ceil_div(max(rows, 1), tiles.rows) * ceil_div(columns, tiles.columns)
        per_tile = tiles.rows * tiles.columns + (tiles.rows + tiles.columns) * PRODUCTS_PER_LOAD[name]
        return ceil_div(count, multiprocessors) * per_tile

    return min(TILES[name, precision], key=work)
