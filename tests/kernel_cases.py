"""What the tests of `bench kernels` share: small examples of every op, and one whose sizes a reader can add up."""

from __future__ import annotations

import torch

from bench.kernels.contenders import BACKWARD, FORWARD
from bench.kernels.examples import NUM_PREFIX, Example, Shape, Source
from bench.kernels.layouts import Drawn, draw_layouts
from bench.kernels.measure import OPERATIONS
from bench.kernels.operation import Operation
from step_kernels import SupertokenLayout

CPU = torch.device("cpu")
ALL_TASKS = [
    (operation, direction)
    for operation in OPERATIONS
    for direction in ((FORWARD, BACKWARD) if operation.gradients else (FORWARD,))
]
TASKS = [task for task in ALL_TASKS if task[0].plain]  # eager and compiled PyTorch run beside ours
ATTENTION_TASKS = [task for task in ALL_TASKS if task[0].rivals]


def task_name(value: object) -> str:
    return value.name if isinstance(value, Operation) else str(value)


def examples(operation: Operation, dtype: torch.dtype = torch.float32, count: int = 2) -> list[Example]:
    """On grids that are not square and that side 16 does not divide."""
    shape = Shape(batch=3, grid=(18, 20), patch=2, dim=32, classes=7, dtype=dtype, device=CPU)
    drawn = draw_layouts(count, shape.batch, shape.grid, num_prefix=NUM_PREFIX, dtype=dtype, seed=3, device=CPU)
    return [operation.make(Source(shape, one, number)) for number, one in enumerate(drawn)]


def small_source() -> Source:
    """One image of 4 x 4 cells: a class token, a block of side 2 in the top-left corner, 12 single cells: 14 rows."""
    shape = Shape(batch=1, grid=(4, 4), patch=2, dim=8, classes=3, dtype=torch.float32, device=CPU)
    sides = torch.ones(1, 4, 4, dtype=torch.int32)
    sides[0, :2, :2] = 2
    layout = SupertokenLayout.from_sides(sides, num_prefix=1).trim()
    scores = torch.tensor([[[1.0, -1.0], [-1.0, -1.0]]]), torch.tensor([[[-1.0]]])
    return Source(shape, Drawn(scores, (2, 4), layout), seed=0)
