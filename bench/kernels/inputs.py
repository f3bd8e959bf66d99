"""Inputs of single ops: layouts, and numbers that rotate.

*Exact*: capacity is the live count; what PyTorch gets, so that it needs no sync to learn it. *Static*: capacity is the unmerged patch grid,
the live count is on the device, the rest of every packed tensor is NaN; what a captured model hands to kernels, and step_kernels on a GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_kernels import SupertokenLayout, use_backend
from step_kernels.model.vit import PRESETS

from ..layouts import NUM_PREFIX, SPREAD, Drawn, draw_layouts, who_halts
from ..options import Options

PATCH, CLASSES = 16, 150
INPUTS = {"cuda": 8, "cpu": 3}
STATIC = ("cuda",)


@dataclass(frozen=True)
class Example:
    """One input of one op."""

    layout: SupertokenLayout
    tensors: Mapping[str, Tensor]  # "gradient": that of the output; "canvas" is written in place, first a "background"
    packed: frozenset[str] = frozenset()  # names of those that have a row for each token

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def of(self, *names: str) -> list[Any]:
        return [self.tensors[name] for name in names]

    def having(self, tensors: Mapping[str, Tensor]) -> Example:
        return dataclasses.replace(self, tensors={**self.tensors, **tensors})

    def double(self) -> Example:
        return self.having({name: t.double() for name, t in self.tensors.items() if t.is_floating_point()})

    def static(self, capacity: int | None = None) -> Example:
        """The static form of an exact example, at the unmerged grid's capacity unless another is asked for."""
        if capacity is None:
            capacity = self.layout.batch_size * self.layout.max_seqlen
        cells, live = padded(self.layout.cells, capacity), self.layout.capacity
        layout = dataclasses.replace(self.layout, cells=cells, trimmed=False, expected_tokens=live)
        wide = self.having({name: padded(self[name], capacity) for name in self.packed})
        return dataclasses.replace(wide, layout=layout)


def padded(tensor: Tensor, capacity: int) -> Tensor:
    """More rows: NaN, which an op that reads them gives away, or zeros where there is no NaN."""
    rows = tensor.new_full((capacity, *tensor.shape[1:]), math.nan if tensor.is_floating_point() else 0)
    rows[: tensor.shape[0]] = tensor
    return rows


class Source:
    """Where one input of every op comes from: sizes, a layout, who of it halts, a policy's scores, random numbers."""

    def __init__(self, options: Options, drawn: Drawn, number: int = 0) -> None:
        device, side, preset = options.device, options.size[0] // PATCH, PRESETS[options.vit[0]]
        self.layout, self.dtype = drawn.layout.to(device), options.dtype
        self.live, self.batch = drawn.layout.capacity, drawn.layout.batch_size
        self.grid, self.cells, self.pixels = (side, side), side * side, (side * PATCH, side * PATCH)
        self.dim, self.heads = preset["embed_dim"], (preset["num_heads"], preset["embed_dim"] // preset["num_heads"])
        self.halted = who_halts(SPREAD, drawn.layout, torch.Generator().manual_seed(number)).to(device)
        self.scores = {f"side {side}": one.to(device) for side, one in zip(drawn.sides, drawn.scores, strict=True)}
        self.generator = torch.Generator(device).manual_seed(number)

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the run's dtype."""
        return (scale * torch.randn(size, generator=self.generator, device=self.layout.device)).to(self.dtype)

    def example(
        self, packed: Iterable[str], sizes: Mapping[str, tuple[int, ...]], scales: Mapping[str, float] | None = None
    ) -> Example:
        """Random tensors; those in `packed` have a row for each token."""
        scales = scales or {}
        numbers = {name: self.random(*size, scale=scales.get(name, 1.0)) for name, size in sizes.items()}
        return Example(self.layout, numbers, frozenset(packed))

    def canvas(self, channels: int) -> Tensor:
        """[B, channels, rows, cols] as `scatter_back` makes it: channels last in memory."""
        return self.random(self.batch, *self.grid, channels).permute(0, 3, 1, 2)


def spread(options: Options, times: int = 1) -> list[Source]:
    """As uneven as a policy leaves them; several times the images are the same ones over and over."""
    grid = (options.size[0] // PATCH,) * 2
    drawn = draw_layouts(INPUTS[options.device.type], options.batch[0], grid, dtype=options.dtype)
    if times > 1:
        with use_backend("reference"):  # on the CPU
            sides = [one.layout.sides().repeat(times, 1, 1) for one in drawn]
            layouts = [SupertokenLayout.from_sides(one, num_prefix=NUM_PREFIX).trim() for one in sides]
        drawn = [Drawn((), (), layout) for layout in layouts]
    return [Source(options, one, number) for number, one in enumerate(drawn)]


def of_lengths(options: Options, lengths: Sequence[int]) -> list[Source]:
    """Images of that many tokens, no prefix among them: the first cells of each patch grid."""
    side = options.size[0] // PATCH
    taken = torch.arange(side * side) < torch.tensor(lengths)[:, None]
    with use_backend("reference"):  # on the CPU
        layout = SupertokenLayout.from_sides(taken.unflatten(1, (side, side)).to(torch.int32)).trim()
    return [Source(options, Drawn((), (), layout), number) for number in range(INPUTS[options.device.type])]
