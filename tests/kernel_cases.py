"""What the tests of `bench kernels` share: small examples of every op, one whose sizes a reader can add up, a GPU's without memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.kernels.examples import NUM_PREFIX, Example, Shape, Source
from bench.kernels.layouts import Drawn, draw_layouts
from bench.kernels.measure import tasks_of
from bench.kernels.operation import Operation
from bench.kernels.settings import GPU_DEFAULTS, OPS, PATCH_SIZE
from bench.settings import DTYPES
from step_kernels import SupertokenLayout
from step_kernels.model.vit import PRESETS

CPU = torch.device("cpu")
ALL_TASKS = tasks_of(OPS, CPU)
ATTENTION_TASKS = [task for task in ALL_TASKS if task[0].rivals]
LINEAR_TASKS = [task for task in ALL_TASKS if task[0].tight]
# Eager and compiled PyTorch run beside ours; of the linear layers, which differ in size alone, at one number of rows.
TASKS = [task for task in ALL_TASKS if task[0].plain and task not in LINEAR_TASKS]
GATED_TASKS = [*TASKS, *(task for task in LINEAR_TASKS if task[0].batches == 1)]


def task_name(value: object) -> str:
    return value.name if isinstance(value, Operation) else str(value)


def sources(dtype: torch.dtype = torch.float32, count: int = 2) -> list[Source]:
    """On grids that are not square and that side 16 does not divide."""
    shape = Shape(batch=3, grid=(18, 20), patch=2, dim=32, classes=7, dtype=dtype, device=CPU)
    drawn = draw_layouts(count, shape.batch, shape.grid, num_prefix=NUM_PREFIX, dtype=dtype, seed=3, device=CPU)
    return [Source(shape, one, number) for number, one in enumerate(drawn)]


def examples(operation: Operation, dtype: torch.dtype = torch.float32, count: int = 2) -> list[Example]:
    return [operation.make(source) for source in sources(dtype, count)]


def small_source() -> Source:
    """One image of 4 x 4 cells: a class token, a block of side 2 in the top-left corner, 12 single cells: 14 rows."""
    shape = Shape(batch=1, grid=(4, 4), patch=2, dim=8, classes=3, dtype=torch.float32, device=CPU)
    sides = torch.ones(1, 4, 4, dtype=torch.int32)
    sides[0, :2, :2] = 2
    layout = SupertokenLayout.from_sides(sides, num_prefix=1).trim()
    scores = torch.tensor([[[1.0, -1.0], [-1.0, -1.0]]]), torch.tensor([[[-1.0]]])
    return Source(shape, Drawn(scores, (2, 4), layout), seed=0)


class Weightless(Source):
    """Tensors of any size in the memory of one number."""

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.zeros((), dtype=self.shape.dtype).expand(size)

    def canvas(self, channels: int) -> dict[str, Tensor]:
        empty = self.random(self.shape.batch, channels, *self.shape.grid)
        return {"canvas": empty, "background": empty}


def on_a_gpu(operation: Operation) -> Source:
    """What an op gets on a GPU at the defaults."""
    cells = GPU_DEFAULTS["size"] // PATCH_SIZE
    shape = Shape(
        batch=operation.batch(GPU_DEFAULTS["batch"]),
        grid=(cells, cells),
        patch=PATCH_SIZE,
        dim=PRESETS[GPU_DEFAULTS["model"]]["embed_dim"],
        classes=GPU_DEFAULTS["classes"],
        dtype=DTYPES[GPU_DEFAULTS["dtype"]],
        device=CPU,
    )
    keywords = {"num_prefix": NUM_PREFIX, "dtype": shape.dtype, "device": CPU}
    return Weightless(shape, *draw_layouts(1, shape.batch, shape.grid, seed=0, **keywords), seed=0)
