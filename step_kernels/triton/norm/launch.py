"""Launchers of LayerNorm on the live rows; kernels: ``forward.py``, ``backward.py``. Both modes run the same kernels.

Device kernels: 1 forward; backward 1, or 3 where weight or bias needs a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import empty_of
from ..common import tuned
from ..common.launch import OPTIONS, batch_of, ceil_div, multiprocessors, on_device_of, power_of_2, stride
from ..common.operands import dtype_class
from ..common.remembered import Launch, launch
from .backward import layer_norm_backward_kernel, layer_norm_parameters_kernel, sum_chunks_kernel
from .forward import layer_norm_kernel

# Not measured on a GPU yet.
ELEMENTS = 4096  # of a program's tile: 32 a thread, two to four 16-byte loads in flight
COLUMNS = 4096  # up to here a row stays in registers
STEP_COLUMNS = 1024  # wider rows are read again, in steps, two rows at a time: more of either spills
MOST_ROWS = 8  # of a tile, however narrow the rows: 16 rows of 150 columns, which have no 16-byte loads, spill
WARPS = 4
# Programs per multiprocessor, as many as registers let it hold at a time, so that none waits for another to end: of whole rows, of MOST_ROWS
# of them, of rows read in steps. Narrow rows' loads and masks take most: 118 registers on sm_120.
FORWARD_PROGRAMS = 6, 4, 4
LOWER_PROGRAMS = 9, 7  # of tiles half as high
BACKWARD_PROGRAMS = 3, 3, 2
PARAMETER_ROWS = 32  # tile of the sums for weight and bias: 128 bytes of 16-bit rows, 16 sums a thread for each
PARAMETER_COLUMNS = 64
CHUNKS = 64  # shares of the rows: with 16 blocks of columns (D = 1024) about eight programs per multiprocessor


def ragged_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, cu_seqlens: Tensor | None, fill_tail: bool
) -> Tensor:
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if out.numel() == 0:
        return out
    with on_device_of(x):
        launch(_forward, (out,), (x, weight, bias, cu_seqlens), eps, fill_tail)
    return out


def _forward(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    fill_tail: bool,
) -> Launch:
    tiles, resident = row_tiles(x.shape[1]), FORWARD_PROGRAMS
    if measured := tuned.row(x.device, *row_key(x)):
        tiles["ROWS"], resident = measured[0], (measured[1],) * 3
    arguments = (
        out, x, weight, bias, cu_seqlens, x.stride(), (stride(weight), stride(bias)), eps, batch_of(cu_seqlens), *x.shape,
    )  # fmt: skip
    return layer_norm_kernel, (num_programs(x, tiles, resident),), arguments, {"FILL_TAIL": fill_tail, **tiles}


def ragged_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    rows, width = x.shape
    grads = empty_of(needed, grad, (x.shape, (width,), (width,)))
    if x.numel() == 0 or not any(needed):
        return tuple(each.zero_() for each in grads)
    grad_x, grad_weight, grad_bias = grads
    tiles = row_tiles(width)
    statistics = grad.new_empty((2, rows), dtype=torch.float32) if any(needed[1:]) else None
    metadata = cu_seqlens, grad.stride(), x.stride()
    sizes = batch_of(cu_seqlens), rows, width
    with on_device_of(x):
        layer_norm_backward_kernel[(num_programs(x, tiles, BACKWARD_PROGRAMS),)](
            grad_x if needed[0] else None, statistics, grad, x, weight, *metadata, stride(weight), eps, *sizes,
            **tiles, **OPTIONS,
        )  # fmt: skip
        if statistics is not None:
            chunks = min(CHUNKS, power_of_2(ceil_div(rows, PARAMETER_ROWS)))
            partial = grad.new_empty((chunks, 2, width), dtype=torch.float32)
            columns = ceil_div(width, PARAMETER_COLUMNS)
            layer_norm_parameters_kernel[(columns * chunks,)](
                partial, statistics, grad, x, *metadata, *sizes,
                CHUNKS=chunks, ROWS=PARAMETER_ROWS, COLUMNS=PARAMETER_COLUMNS, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
            sum_chunks_kernel[(columns,)](
                grad_weight if needed[1] else None, grad_bias if needed[2] else None, partial, width,
                CHUNKS=chunks, COLUMNS=PARAMETER_COLUMNS, num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    return grads


def row_tiles(width: int) -> dict[str, int | bool]:
    """Rows and columns of a program's tile, and whether it holds whole rows."""
    whole = width <= COLUMNS
    columns = power_of_2(width) if whole else STEP_COLUMNS
    rows = max(1, min(MOST_ROWS, ELEMENTS // columns)) if whole else 2
    return {"ROWS": rows, "COLUMNS": columns, "WHOLE": whole, "num_warps": WARPS}


def row_key(x: Tensor) -> tuple[object, ...]:
    return "layer_norm", dtype_class(x.dtype), x.shape[1]


def forward_candidates(x: Tensor) -> list[tuple[int, int]]:
    """Rows of a tile and programs per multiprocessor to be measured, the committed ones first: lower tiles, of which registers let more run."""
    tiles = row_tiles(x.shape[1])
    rows, most = int(tiles["ROWS"]), int(tiles["ROWS"] == MOST_ROWS)
    found = [(rows, FORWARD_PROGRAMS[most])]
    if rows > 1 and tiles["WHOLE"] and x.dtype != torch.float32:
        found.append((rows // 2, LOWER_PROGRAMS[most]))
    return found


def num_programs(x: Tensor, tiles: dict[str, int | bool], resident: tuple[int, int, int]) -> int:
    kind = 2 if not tiles["WHOLE"] else int(tiles["ROWS"] == MOST_ROWS)
    return min(ceil_div(x.shape[0], tiles["ROWS"]), resident[kind] * multiprocessors(x.device))
