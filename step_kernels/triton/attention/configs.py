"""Tile sizes per (kernel, architecture class, dtype class, head_dim): a table with reasons, no run-time autotuning.

A row serves every head dimension up to its width that the rows above it do not. None of it has been measured on a GPU yet: rows were
chosen ahead of time, so that nothing spills (exceptions say so), shared memory fits every chip of the class, and two or more programs share a multiprocessor
where registers allow. Figures are of Triton 3.6.0 or 3.9.0, whichever is worse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.launch import architecture_class
from ..common.operands import dtype_class


class Tiles(NamedTuple):
    """Tile of one program: rows that it owns, rows of each step of its loop, warps, pipeline stages."""

    own: int
    step: int
    warps: int
    stages: int


Rows = tuple[tuple[int, Tiles], ...]  # (width of a head, padding included; row)
Table = dict[tuple[str, str], Rows]

# mma.sync holds a program's own tile in registers as the first operand of its matmuls: the wider a head, the lower the tile.
_MMA_FORWARD_WIDE: Rows = (
    (192, Tiles(32, 32, 8, 3)),  # 32 rows, so that the warps share a head's columns; 64 rows spill a kilobyte
    (256, Tiles(32, 16, 8, 2)),  # steps of 32 keys spill 8 to 32 bytes in Triton 3.6
)
_MMA_FORWARD: Rows = (
    (64, Tiles(128, 64, 8, 3)),  # 199 registers; 4 warps of twice the rows spill
    (80, Tiles(128, 64, 8, 2)),  # a third stage spills
)
_MMA_GRAD_KV: Rows = (
    (64, Tiles(128, 32, 8, 2)),  # 214 registers; steps of 64 queries spill
    (80, Tiles(64, 32, 4, 2)),  # 251 registers
    (96, Tiles(32, 32, 4, 2)),  # k, v and both sums of 64 rows no longer fit the registers
    (128, Tiles(32, 16, 4, 2)),  # steps of 32 spill 64 bytes
    (256, Tiles(16, 16, 8, 2)),  # the only one that does not spill
)
_MMA_GRAD_Q: Rows = (
    (80, Tiles(64, 32, 4, 2)),  # 168 registers at 64 columns: three programs share a multiprocessor; 218 at 80
    (128, Tiles(32, 32, 4, 2)),  # 64 rows spill
    (256, Tiles(16, 16, 4, 2)),  # 32 rows spill
)
# fp32 at torch's default precision runs without tensor cores, each thread holding whole rows and columns of its operands: low tiles,
# and spills beyond 64 columns all the same. A stage less saves registers too.
_FLOAT_FORWARD: Rows = ((64, Tiles(16, 32, 4, 2)), (256, Tiles(16, 16, 8, 1)))
_FLOAT_BACKWARD: Rows = ((256, Tiles(16, 16, 8, 1)),)

FORWARD: Table = {
    # Steps of 64 keys spill at 128 columns; on sm_120 so do steps of 32.
    ("ampere", "half"): (*_MMA_FORWARD, (128, Tiles(128, 32, 8, 3)), *_MMA_FORWARD_WIDE),
    ("consumer", "half"): (*_MMA_FORWARD, (96, Tiles(128, 32, 8, 3)), (128, Tiles(128, 16, 8, 2)), *_MMA_FORWARD_WIDE),
    ("hopper", "half"): (
        # Two programs, one's softmax under the other's matmuls. 214 registers, 255 with biases.
        (64, Tiles(128, 64, 4, 3)),
        # 211 registers. With biases 8 bytes spill in Triton 3.6 where tails are filled; more in a third stage, or of 4 warps.
        (96, Tiles(128, 128, 8, 2)),
        (128, Tiles(128, 64, 8, 3)),  # 209 registers with biases; steps of 128 keys spill 16 bytes
        (192, Tiles(128, 64, 8, 2)),  # 226 registers with biases; no second program would fit in any case
        (256, Tiles(64, 32, 4, 2)),  # 250 registers with biases: two programs
    ),
    ("blackwell", "half"): (
        (64, Tiles(128, 64, 8, 3)),  # sums live in tensor memory: 117 registers, two programs share a multiprocessor
        (96, Tiles(64, 64, 4, 3)),  # 132 registers; 128 rows spill 16 bytes
        (128, Tiles(128, 64, 8, 3)),  # 4 warps spill
        (256, Tiles(64, 32, 4, 2)),  # more rows or keys spill, or exceed shared memory
    ),
}
# Where tiles of 128 rows make less than FEW programs per multiprocessor (few images, few heads), lower ones leave fewer idle.
FEW = 2
FORWARD_FEW: Table = {
    ("ampere", "half"): ((64, Tiles(64, 32, 4, 3)),),  # 168 registers: three programs; steps of 64 spill 8 bytes
    ("consumer", "half"): ((64, Tiles(64, 32, 4, 3)),),  # 141 registers: three programs; steps of 64 spill 8 bytes
    ("hopper", "half"): ((64, Tiles(64, 64, 4, 3)),),  # 125 registers: three programs, by shared memory
    ("blackwell", "half"): ((64, Tiles(64, 64, 4, 2)),),  # 137 registers: three programs; a third stage spills 8 bytes
}
# Rows beside these for heads of up to this width, to be measured. Nothing spills where tails are not filled, as in the model.
FORWARD_CANDIDATES: Table = {
    ("ampere", "half"): ((64, Tiles(128, 32, 4, 3)), (64, Tiles(128, 64, 8, 2)), (80, Tiles(64, 64, 4, 2))),
    ("consumer", "half"): ((64, Tiles(128, 32, 4, 3)), (64, Tiles(128, 64, 8, 2)), (80, Tiles(64, 64, 4, 2))),
    ("hopper", "half"): (
        (64, Tiles(128, 128, 8, 3)),  # half the barriers and 11 % less instructions per key, but no second program
        (64, Tiles(64, 128, 4, 2)),  # two programs
        (96, Tiles(64, 64, 4, 3)),  # two programs at 96 columns, three at 80
        (128, Tiles(64, 64, 4, 2)),  # two programs
    ),
    ("blackwell", "half"): ((64, Tiles(128, 128, 8, 2)), (96, Tiles(64, 64, 4, 2))),
}
GRAD_KV: Table = {
    ("ampere", "half"): _MMA_GRAD_KV,
    ("consumer", "half"): _MMA_GRAD_KV,
    ("hopper", "half"): (
        (80, Tiles(128, 64, 8, 2)),  # 212 registers at 64 columns, 240 at 80
        (96, Tiles(128, 32, 8, 2)),  # 203 registers
        (128, Tiles(64, 32, 8, 2)),  # 170 registers
        (256, Tiles(64, 32, 8, 2)),  # 246 registers at 192 columns; spills 112 bytes at 256
    ),
    ("blackwell", "half"): (
        (96, Tiles(64, 64, 4, 2)),  # 214 registers at 64 columns, 255 at 96
        (128, Tiles(64, 64, 8, 2)),  # 80 registers
        (256, Tiles(64, 32, 8, 2)),  # steps of 64 exceed shared memory
    ),
}
GRAD_Q: Table = {
    ("ampere", "half"): _MMA_GRAD_Q,
    ("consumer", "half"): _MMA_GRAD_Q,
    ("hopper", "half"): (
        (128, Tiles(128, 64, 8, 2)),  # 124 registers at 64 columns: two programs; 169 at 128
        (256, Tiles(64, 32, 8, 2)),  # 196 registers
    ),
    ("blackwell", "half"): (
        (96, Tiles(64, 64, 4, 2)),  # 126 registers
        (128, Tiles(64, 64, 8, 2)),  # 79 registers
        (256, Tiles(64, 32, 8, 2)),  # 100 registers
    ),
}
for _name in ("ampere", "consumer", "hopper", "blackwell"):
    FORWARD[_name, "float"] = _FLOAT_FORWARD
    GRAD_KV[_name, "float"] = GRAD_Q[_name, "float"] = _FLOAT_BACKWARD

TABLES: dict[str, Table] = {"attention_forward": FORWARD, "attention_grad_kv": GRAD_KV, "attention_grad_q": GRAD_Q}
# The same for the backward kernels; figures without biases.
GRAD_CANDIDATES: dict[str, Table] = {
    "attention_grad_kv": {
        ("ampere", "half"): ((64, Tiles(64, 32, 4, 2)),),  # 224 registers: two programs of half as many warps
        ("consumer", "half"): ((64, Tiles(64, 32, 4, 2)),),  # 212 registers: the same
        ("hopper", "half"): ((64, Tiles(64, 64, 4, 2)),),  # 187 registers: the same
        ("blackwell", "half"): ((64, Tiles(128, 64, 8, 2)),),  # up to 226 registers, one program
    },
    "attention_grad_q": {
        ("ampere", "half"): ((64, Tiles(64, 64, 4, 2)),),  # 254 registers: two programs with half the steps
        ("consumer", "half"): ((64, Tiles(64, 64, 4, 2)),),  # the same
        ("hopper", "half"): ((64, Tiles(64, 64, 4, 2)),),  # 123 registers: four programs
        ("blackwell", "half"): ((64, Tiles(128, 64, 8, 2)),),  # 127 registers: two programs
    },
}

DELTA_ROWS = 64  # rows of one head that a program multiplies and sums: enough bytes in flight, few registers
DELTA_WARPS = 4


def tiles(table: Table, architecture: int, dtype: torch.dtype, width: int, few: bool = False) -> Tiles:
    """The row for ``width`` columns of a head, padding included; ``few``: of ``FORWARD_FEW``, where it has one."""
    name = architecture_class(architecture), dtype_class(dtype)
    for limit, row in (*(FORWARD_FEW.get(name, ()) if few else ()), *table[name]):
        if width <= limit:
            return row
    raise ValueError(f"no row for {width} columns")


def forward_candidates(architecture: int, dtype: torch.dtype, width: int, few: bool) -> list[Tiles]:
    """Rows of the forward kernel to be measured, the table's first."""
    name = architecture_class(architecture), dtype_class(dtype)
    others = (*FORWARD_FEW.get(name, ()), *FORWARD_CANDIDATES.get(name, ()))
    return _with_fitting(tiles(FORWARD, architecture, dtype, width, few), others, width)


def backward_candidates(kernel: str, architecture: int, dtype: torch.dtype, width: int) -> list[Tiles]:
    """Rows of ``attention_grad_kv`` or ``attention_grad_q`` to be measured, the table's first."""
    others = GRAD_CANDIDATES[kernel].get((architecture_class(architecture), dtype_class(dtype)), ())
    return _with_fitting(tiles(TABLES[kernel], architecture, dtype, width), others, width)


def _with_fitting(default: Tiles, others: Rows, width: int) -> list[Tiles]:
    return [*dict.fromkeys((default, *[row for limit, row in others if width <= limit]))]
