"""The four linear layers of a transformer block, alone, at three numbers of live rows.

A layer does not know images, so every input of one number of rows has exactly that many: a patch grid's cells over the reduction,
for an eighth of the run's batch, all of it and two and a half times as many. At 1024 px and batch 8: 1632, 13104 and 32768 rows.
On a GPU, step_kernels gets 2.5 times that capacity; and, in a row beside, a capacity of exactly the live rows.

FLOPs: 2 M N K for M rows, K inputs, N outputs. PyTorch runs at M rows, which it is told; compiled with max-autotune, where
the compiler may put the element-wise part into a matmul of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from step_kernels import SupertokenLayout, ragged_linear

from . import plain_linear
from .examples import Example, Source
from .layouts import REDUCTION
from .operation import Operation, first_rows, nbytes
from .ops_attention import layout_of

BATCHES = 1 / 8, 1.0, 2.5  # of the run's
# Both capacities and the live rows are multiples of it, as far as there are so many, so that one compiled kernel runs with either.
ALIGNED = 16


def live_rows(cells: int) -> int:
    """How many of a batch's cells are left as tokens."""
    rows = int(cells / REDUCTION)
    return rows - rows % ALIGNED or max(1, rows)


def evenly_reduced(source: Source) -> SupertokenLayout:
    """That many tokens, the images as equal as it goes."""
    batch, grid, device = source.shape.batch, source.shape.grid, source.shape.device
    ends = torch.arange(batch + 1, device=device) * live_rows(batch * grid[0] * grid[1]) // batch
    return layout_of(ends.diff(), grid)


def _linear(
    name: str,
    outputs: int,
    inputs: int,
    batches: float,
    plain: tuple[Callable[..., Tensor], ...],
    *,
    activation: str | None = None,
    residual: bool = False,
) -> Operation:
    """`outputs` and `inputs` are multiples of the tokens' width."""

    def make(source: Source) -> Example:
        layout, dim = evenly_reduced(source), source.shape.dim
        tensors = {
            "x": source.random(layout.capacity, inputs * dim),
            "weight": source.random(outputs * dim, inputs * dim, scale=(inputs * dim) ** -0.5),
            "bias": source.random(outputs * dim, scale=0.1),
        }
        if residual:
            tensors["residual"] = source.random(layout.capacity, outputs * dim)
        return Example(layout, tensors, packed=frozenset({"x", "residual"} & tensors.keys()))

    def ours(example: Example) -> Any:
        x, weight, bias, *added = example.tensors.values()
        return ragged_linear(
            x,
            weight,
            bias,
            layout=example.layout,
            activation=activation,
            residual=added[0] if added else None,
            tail="undefined",
        )

    return Operation(
        name=name,
        shown=("x", "weight"),
        registered=("ragged_linear",),
        make=make,
        ours=ours,
        live=first_rows,
        plain=plain,
        arguments=lambda e: tuple(e.tensors.values()),
        necessary_bytes=_bytes,
        flops=_flops,
        batches=batches,
        autotuned=True,
        tight=True,
    )


def _bytes(example: Example) -> int:
    """Every input is read, the output written."""
    written = example["x"].shape[0] * example["weight"].shape[0] * example["x"].element_size()
    return nbytes(*example.tensors.values()) + written


def _flops(example: Example) -> int:
    return 2 * example["x"].shape[0] * example["weight"].numel()


BIAS, GELU, RESIDUAL = "ragged_linear", "ragged_linear_gelu", "ragged_linear_residual"
ACTIVATED = (plain_linear.linear_gelu, plain_linear.linear_gelu_in_place)
ADDED = (plain_linear.linear_residual, plain_linear.linear_residual_by_addmm)
OPERATIONS = (
    *(_linear(BIAS, 3, 1, batches, (plain_linear.linear,)) for batches in BATCHES),  # q, k and v
    *(_linear(GELU, 4, 1, batches, ACTIVATED, activation="gelu") for batches in BATCHES),  # fc1
    *(_linear(RESIDUAL, 1, 1, batches, ADDED, residual=True) for batches in BATCHES),  # the projection after attention
    *(_linear(RESIDUAL, 1, 4, batches, ADDED, residual=True) for batches in BATCHES),  # fc2
)
