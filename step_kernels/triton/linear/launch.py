"""Launcher of the linear layer on packed tokens; kernel: ``kernel.py``, ``epilogue.py``; tiles: ``configs.py``.

Static mode (``cu_seqlens`` given): one launch of a persistent kernel, tail included; the host chooses tiles by ``expected_tokens`` (None: the
capacity), and whatever it expected, any live count up to the capacity is computed. Exact mode (``cu_seqlens`` None): all rows are live and
their number is known to the host, where the vendor's matmul is hard to beat, so the PyTorch reference runs.
Backward: the vendor's matmuls, in static mode over the whole capacity, behind copies whose tails are zeros; training runs in exact mode.
"""

from __future__ import annotations

from torch import Tensor

from ...reference import linear as reference
from ..common import tuned
from ..common.launch import architecture, ceil_div, multiprocessors, on_device_of, power_of_2, stride, uses_descriptors
from ..common.live_rows import zero_past_live_rows
from ..common.operands import describable, descriptor
from ..common.remembered import Launch, launch
from . import configs
from .configs import Tiles, choose_tiles, precision_of
from .kernel import linear_kernel


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    fill_tail: bool,
    expected_tokens: int | None,
) -> Tensor:
    if cu_seqlens is None:
        return reference.linear_of_all_rows(x, weight, bias, activation, gamma, residual)
    out = x.new_empty(x.shape[0], weight.shape[0])
    if out.numel() == 0:
        return out
    given = x, weight, bias, gamma, residual, cu_seqlens
    with on_device_of(x):
        launch(_forward, (out,), given, activation, fill_tail, expected_tokens, precision_of(x.dtype))
    return out


def _forward(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    cu_seqlens: Tensor,
    activation: str | None,
    fill_tail: bool,
    expected_tokens: int | None,
    precision: str,
) -> Launch:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    target, available = architecture(x.device), multiprocessors(x.device)
    # Products without tensor cores read their operands from registers: bulk copies to shared memory would only be in the way.
    tma = uses_descriptors(target) and precision != "ieee" and describable(x) and describable(weight)
    tma_residual = tma and residual is not None and describable(residual)
    tiles = configs.UNALIGNED[precision]
    inputs_fast = tma or (vectorised(x) and vectorised(weight))
    if inputs_fast and vectorised(out) and (residual is None or vectorised(residual)):
        expected = rows if expected_tokens is None else min(expected_tokens, rows)
        measured = tuned.row(x.device, "linear", precision, inputs, outputs, power_of_2(max(1, expected)))
        tiles = Tiles(*measured) if measured else choose_tiles(target, precision, expected, outputs, available)
    # By the capacity, not by what is expected: programs share out whatever count they find, however many they are.
    most = ceil_div(rows, tiles.rows) * ceil_div(outputs, tiles.columns)
    arguments = (
        out,
        descriptor(x, (tiles.rows, tiles.inputs)) if tma else x,
        descriptor(weight, (tiles.columns, tiles.inputs)) if tma else weight,
        bias, gamma, descriptor(residual, (tiles.rows, tiles.columns // tiles.parts)) if tma_residual else residual,
        cu_seqlens, x.stride(), weight.stride(), (stride(bias), stride(gamma)), stride(residual),
        cu_seqlens.shape[0] - 1, rows, inputs, outputs,
    )  # fmt: skip
    named = {"ACTIVATION": activation, "FILL_TAIL": fill_tail, "TMA": tma, "TMA_RESIDUAL": tma_residual}
    return (
        linear_kernel,
        (min(most, available * tiles.resident),),
        arguments,
        named | settings(tiles, precision, inputs),
    )


def settings(tiles: Tiles, precision: str, inputs: int) -> dict[str, int | bool | str]:
    """What the kernel and its compiler take from the choice of tiles."""
    return {
        "FLATTEN": tiles.flatten and inputs > 0,  # a flattened loop takes at least one step per tile
        "EVEN": inputs % tiles.inputs == 0,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",  # 16-bit products are exact in either
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INPUTS": tiles.inputs,
        "GROUP": configs.GROUP,
        "PARTS": tiles.parts,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def vectorised(matrix: Tensor) -> bool:
    """Whether Triton loads a matrix 16 bytes at a time: rows of multiples of 16 elements, which start there too."""
    row, column = matrix.stride()
    return matrix.data_ptr() % 16 == 0 and row % 16 == 0 and matrix.shape[1] % 16 == 0 and column == 1


def ragged_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    gamma: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    if cu_seqlens is None:
        return reference.ragged_linear_backward(grad, x, weight, bias, None, activation, gamma, needed)
    grad = zero_past_live_rows(grad, cu_seqlens)
    if activation is not None or needed[1] or needed[3]:
        x = zero_past_live_rows(x, cu_seqlens)
    of_residual = grad if needed[4] else grad.new_empty(0)
    found = reference.ragged_linear_backward(grad, x, weight, bias, None, activation, gamma, [*needed[:4], False])
    return *found[:4], of_residual
