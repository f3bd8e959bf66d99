"""Inputs of one op, in two forms that hold the same live rows.

*Exact*: capacity equals the live count; what PyTorch contenders and the reference get, so they need no sync to learn it.
*Static*: capacity is the unmerged patch grid, the live count is on the device, the rest of every packed tensor is NaN; what the
model hands to kernels in a CUDA graph. step_kernels gets it on a GPU.

Both can be written over in their own memory, so that an answer kept from before the clock answers another question.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from step_kernels import Halting, SupertokenLayout, attention_schedule

from .layouts import Drawn

NUM_PREFIX = 1  # the class token
HALT_SHARE = 0.4


@dataclass(frozen=True)
class Shape:
    """Sizes that all ops of one run share."""

    batch: int
    grid: tuple[int, int]
    patch: int
    dim: int
    classes: int
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch


@dataclass(frozen=True)
class Example:
    """One input of one op.

    Attributes:
        layout: supertokens of the batch.
        tensors: the op's tensors by name; "canvas" is written in place and starts as "background" each time it is checked.
        packed: names of the tensors that have one row per token.
        scores, sides: what `resolve_layout` starts from.
        halting: a recorded exit stage, for `gather_tokens`.
        size: of the labels, for `upsample_argmax`.
    """

    layout: SupertokenLayout
    tensors: Mapping[str, Tensor]
    packed: frozenset[str] = frozenset()
    scores: tuple[Tensor, ...] = ()
    sides: tuple[int, ...] = ()
    halting: Halting | None = None
    size: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @functools.cached_property
    def schedule(self) -> Tensor:
        """Of `ragged_attention`: built by the first call, which is not timed, as a stage builds it once for its blocks."""
        return attention_schedule(self.layout.cu_seqlens, self.layout.capacity)

    def double(self) -> Example:
        """The same numbers in fp64, in memory of their own."""
        tensors = {name: t.double() if t.is_floating_point() else t for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, scores=tuple(score.double() for score in self.scores))

    def differentiable(self, names: tuple[str, ...]) -> Example:
        """The same tensors; those named require a gradient."""
        leaves = {name: self.tensors[name].detach().requires_grad_() for name in names}
        return dataclasses.replace(self, tensors={**self.tensors, **leaves})

    def static(self, capacity: int | None = None) -> Example:
        """The static form of an exact example, in memory of its own where it has tokens; another capacity if asked."""
        if capacity is None:
            capacity = self.layout.batch_size * self.layout.max_seqlen
        layout = _untrimmed(self.layout, capacity)
        tensors = {n: _padded(t, capacity) if n in self.packed else t for n, t in self.tensors.items()}
        halting = None if self.halting is None else _untrimmed_halting(self.halting, capacity)
        return dataclasses.replace(self, layout=layout, tensors=tensors, halting=halting)

    def reset(self) -> None:
        """Forgets what an earlier call has written."""
        if "canvas" in self.tensors:
            self["canvas"].copy_(self["background"])

    @torch.no_grad()
    def take_over(self, fresh: Example, *, integers: bool = False) -> None:
        """Writes the numbers of another exact example of the same sizes into the memory of this one; its layout and tails stay.

        Masks stay, too, and integers unless asked: they belong to the layout.
        """
        for name, numbers in fresh.tensors.items():
            if numbers.is_floating_point() or (integers and numbers.dtype != torch.bool):
                self[name][: numbers.shape[0]].copy_(numbers)


def distinct_numbers(examples: Iterable[Example]) -> list[Tensor]:
    """The tensors of several forms of one example, masks left out; those that share memory once."""
    tensors = [tensor.detach() for example in examples for tensor in example.tensors.values()]
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.dtype != torch.bool}.values())


def distinct_canvases(examples: Iterable[Example]) -> list[Example]:
    """Those forms of one example that have a canvas to be reset, once for each memory."""
    return list({own["canvas"].data_ptr(): own for own in examples if "canvas" in own.tensors}.values())


def _untrimmed(layout: SupertokenLayout, capacity: int) -> SupertokenLayout:
    expected = layout.capacity  # as the warm-up of a captured model would have seen
    return dataclasses.replace(layout, cells=_padded(layout.cells, capacity), trimmed=False, expected_tokens=expected)


def _untrimmed_halting(halting: Halting, capacity: int) -> Halting:
    padded = {name: _padded(getattr(halting, name), capacity) for name in ("rows", "halted", "confidence", "labels")}
    return dataclasses.replace(halting, layout=_untrimmed(halting.layout, capacity), **padded)


def _padded(tensor: Tensor, capacity: int) -> Tensor:
    """More rows: NaN, which an op that reads them gives away, or zeros where there is no NaN."""
    fill = math.nan if tensor.is_floating_point() else 0
    padded = tensor.new_full((capacity, *tensor.shape[1:]), fill)
    padded[: tensor.shape[0]] = tensor
    return padded


@dataclass
class Source:
    """Where an op's inputs come from: one drawn batch and random numbers that depend on the seed alone."""

    shape: Shape
    drawn: Drawn
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.shape.device).manual_seed(self.seed)

    @property
    def layout(self) -> SupertokenLayout:
        return self.drawn.layout

    @property
    def live(self) -> int:
        return self.layout.capacity

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the run's dtype."""
        return (scale * self._normal(*size)).to(self.shape.dtype)

    def canvas(self, channels: int) -> dict[str, Tensor]:
        """ "canvas" and "background", [B, channels, rows, cols] as `scatter_back` makes them: channels last in memory."""
        background = self.random(self.shape.batch, *self.shape.grid, channels).permute(0, 3, 1, 2)
        return {"canvas": background.clone(memory_format=torch.preserve_format), "background": background}

    def halted(self) -> Tensor:
        """bool [live]: as many of the blocks as halt at the exits."""
        blocks = (self.layout.cells[:, 3] > 0).nonzero().flatten()
        order = torch.rand(blocks.shape[0], generator=self.generator, device=self.shape.device).argsort()
        halted = torch.zeros(self.live, dtype=torch.bool, device=self.shape.device)
        halted[blocks[order[: round(HALT_SHARE * blocks.shape[0])]]] = True
        return halted

    def logits(self, halted: Tensor, low: float, high: float) -> Tensor:
        """fp32 [live, classes]: one class leads by `low`, or by `high` in tokens that are to halt and in prefix tokens.

        The two are so far apart that rounding decides nothing: every honest contender halts the same tokens. Prefix tokens
        look confident, so a contender that forgets to spare them is caught.
        """
        lead = torch.where(halted | (self.layout.cells[:, 3] == 0), high, low)
        classes = torch.arange(self.shape.classes, device=self.shape.device)
        size = (self.live, 1)
        first = torch.randint(self.shape.classes, size, generator=self.generator, device=self.shape.device)
        return lead[:, None] * (classes == first)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.shape.device)
