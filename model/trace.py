"""A run's decisions: recorded, which tokens were merged and which halted, and to come, who takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Halting, SupertokenLayout
from ..checks import check_choice, check_device, check_int, check_tensor, describe

__all__ = ["Batch", "Run", "Stage", "Trace"]

Sized = TypeVar("Sized", SupertokenLayout, Halting)


@dataclass(frozen=True, eq=False)
class Stage:
    """What one exit decided.

    Attributes:
        block: the exit comes after this block (1-based).
        halted: bool [tokens before the exit]; True where the token left.
        layout: the survivors' layout.
    """

    block: int
    halted: Tensor
    layout: SupertokenLayout


@dataclass(frozen=True, eq=False)
class Trace:
    """The decisions of one forward pass: ``forward(images, replay=trace)`` repeats them.

    A rounding error flips an exit's decision now and then, so two implementations can only be compared at equal decisions.
    ``torch.save`` and ``torch.load`` take a trace as it is. A run in static mode leaves an untrimmed trace; `trim` and
    `untrim` lead from one mode to the other.

    Attributes:
        layout: the layout at the encoder's input.
        stages: one per exit, in block order.
    """

    layout: SupertokenLayout
    stages: tuple[Stage, ...] = ()

    def __repr__(self) -> str:
        """The batch and the tokens that leave the merge and each exit; of untrimmed ones the room for them, without a host sync."""
        rows, cols = self.layout.grid
        stages = [("after the merge", self.layout), *((f"after block {x.block}", x.layout) for x in self.stages)]
        counts = [f"{'' if x.trimmed else 'at most '}{x.capacity} tokens {where}" for where, x in stages]
        return f"Trace({self.layout.batch_size} x {rows} x {cols} patches, {', '.join(counts)})"

    @property
    def final_layout(self) -> SupertokenLayout:
        """The layout of the tokens that reach the end."""
        return self.layout_of(None)

    def layout_of(self, block: int | None) -> SupertokenLayout:
        """The layout of the tokens that block number ``block`` (1-based) computes on; None: after the last block."""
        layouts = [stage.layout for stage in self.stages if block is None or stage.block < block]
        return layouts[-1] if layouts else self.layout

    def token_counts(self) -> tuple[int, ...]:
        """Tokens that leave the merge and each exit. One host sync for each untrimmed layout."""
        return tuple(layout.num_tokens for layout in (self.layout, *(stage.layout for stage in self.stages)))

    def image(self, number: int) -> Trace:
        """The decisions on one image as those of a batch of one, trimmed, in memory of their own. Waits for the host.

        Raises:
            TypeError, ValueError: ``number`` is no image of the batch.
        """
        stages, before = [], self.layout
        for stage in self.stages:
            halted = stage.halted[before.image_rows(number)].clone()
            stages.append(Stage(stage.block, halted, stage.layout.image(number)))
            before = stage.layout
        return Trace(self.layout.image(number), tuple(stages))

    def clone(self) -> Trace:
        """The same decisions in memory of their own."""
        stages = [Stage(stage.block, stage.halted.clone(), stage.layout.clone()) for stage in self.stages]
        return Trace(self.layout.clone(), tuple(stages))

    def tensors(self) -> list[Tensor]:
        """Every tensor of the trace, in an order that depends on the number of stages alone."""
        layouts = [self.layout, *(stage.layout for stage in self.stages)]
        found = [tensor for layout in layouts for tensor in (layout.cu_seqlens, layout.cells)]
        return found + [stage.halted for stage in self.stages]

    def trim(self) -> Trace:
        """The same decisions, every tensor cut to its live rows, as exact mode takes them. One host sync for each layout."""
        layout, stages = self.layout.trim(), []
        before = layout
        for stage in self.stages:
            after = stage.layout.trim()
            stages.append(Stage(stage.block, stage.halted[: before.capacity], after))
            before = after
        return Trace(layout, tuple(stages))

    def untrim(self) -> Trace:
        """The same decisions at full capacity, B * (num_prefix + rows * cols) rows each, as static mode takes them. No host sync."""
        stages = []
        for stage in self.stages:
            spare = full_capacity(stage.layout) - stage.halted.shape[0]
            halted = F.pad(stage.halted, (0, spare)) if spare > 0 else stage.halted
            stages.append(Stage(stage.block, halted, untrimmed(stage.layout)))
        return Trace(untrimmed(self.layout), tuple(stages))

    def check(self, batch: Batch, exits: Sequence[int], *, trimmed: bool = True) -> None:
        """Refuse to be replayed on another batch or by an encoder of other exits (block numbers, ascending). Reads shapes only.

        ``trimmed``: all layouts must be, as in exact mode.
        """
        blocks = [stage.block for stage in self.stages]
        if blocks != list(exits):
            wanted = f"one stage for each exit, after blocks {list(exits)}"
            raise ValueError(f"replay: expected {wanted}, got stages after blocks {blocks}")
        layouts = {"replay.layout": self.layout}
        layouts |= {f"replay.stages[{i}].layout": stage.layout for i, stage in enumerate(self.stages)}
        for name, layout in layouts.items():
            batch.check(name, layout)
            rows, most = layout.capacity, full_capacity(layout)
            if rows > most:
                wanted = f"at most {most} rows, every cell and prefix token of the batch"
                raise ValueError(f"{name}: expected {wanted}, got a capacity of {rows}")
            if trimmed and not layout.trimmed:
                raise ValueError(f"{name}: expected a trimmed layout, got one of capacity {rows}; call trim()")
        for i, stage in enumerate(self.stages):
            tokens = (self.layout_of(stage.block).capacity,)
            check_tensor(f"replay.stages[{i}].halted", stage.halted, tokens, dtypes=(torch.bool,))
            check_device(f"replay.stages[{i}].halted", stage.halted, batch.device, "images")


class Batch(NamedTuple):
    """What all layouts of a run have in common."""

    size: int
    grid: tuple[int, int]
    num_prefix: int
    device: torch.device

    def check(self, name: str, layout: object) -> SupertokenLayout:
        """``layout`` if it is one of this batch."""
        if not isinstance(layout, SupertokenLayout):
            raise TypeError(f"{name}: expected a SupertokenLayout, got {describe(layout)}")
        found = Batch(layout.batch_size, layout.grid, layout.num_prefix, layout.device)
        for what, want, got in zip(("batch size", "grid", "prefix tokens", "device"), self, found, strict=True):
            if got != want:
                raise ValueError(f"{name}: expected {what} {want} as the images have, got {got}")
        return layout


@dataclass(frozen=True, eq=False)
class Run:
    """A forward pass to come: its images, who decides, and how the size of each stage settles.

    Stages are counted from the merge (0) over the exits (1, 2, ...).
    """

    pixels: Tensor  # padded images
    batch: Batch  # what its layouts have in common
    replay: Trace | None = None  # decisions to repeat, at full capacity in static mode; None: policy and exits decide
    static: bool = False  # leave capacities as they are; else trim (one host sync for each stage)
    expected_tokens: tuple[int, ...] | None = None  # live rows of each stage in an earlier run, for the choice of tiles

    @classmethod
    def checked(
        cls,
        pixels: Tensor,
        batch: Batch,
        exits: Sequence[int],
        replay: Trace | None,
        static: bool,
        expected_tokens: Sequence[int] | None,
    ) -> Run:
        """From a caller's arguments, for an encoder with these exits (block numbers, ascending)."""
        check_choice("static", static, (True, False))
        if static and torch.is_grad_enabled():
            raise RuntimeError("static mode is for inference: expected gradients to be disabled (torch.no_grad)")
        counts = None
        if expected_tokens is not None:
            if not static:
                raise ValueError("expected_tokens: expected None in exact mode, whose counts are read, got some")
            if not isinstance(expected_tokens, (list, tuple)):
                raise TypeError(f"expected_tokens: expected a sequence of ints, got {describe(expected_tokens)}")
            if len(expected_tokens) != 1 + len(exits):
                wanted = f"{1 + len(exits)} counts, one after the merge and after each exit"
                raise ValueError(f"expected_tokens: expected {wanted}, got {len(expected_tokens)}")
            numbered = enumerate(expected_tokens)
            counts = tuple(check_int(f"expected_tokens[{i}]", count, minimum=0) for i, count in numbered)
        if replay is not None:
            if not isinstance(replay, Trace):
                raise TypeError(f"replay: expected a Trace or None, got {describe(replay)}")
            replay.check(batch, exits, trimmed=not static)
            replay = replay.untrim() if static else replay
        return cls(pixels, batch, replay, static, counts)

    def settle(self, stage: Sized, number: int) -> Sized:
        """Stage ``number`` with the size that its tokens have from here on."""
        if not self.static:
            return stage.trim()
        if self.expected_tokens is None:
            return stage
        if isinstance(stage, Halting):
            return replace(stage, layout=self.settle(stage.layout, number))
        if stage.trimmed:
            return stage
        expected = self.expected_tokens[number]
        return SupertokenLayout.trusted(stage.cu_seqlens, stage.cells, *self.batch[1:3], expected_tokens=expected)


def full_capacity(layout: SupertokenLayout) -> int:
    """Rows that suffice for any decision on this layout's batch and grid."""
    return layout.batch_size * layout.max_seqlen


def untrimmed(layout: SupertokenLayout) -> SupertokenLayout:
    """The same layout at full capacity, spare rows zero."""
    spare = full_capacity(layout) - layout.capacity
    cells = F.pad(layout.cells, (0, 0, 0, spare)) if spare > 0 else layout.cells
    return SupertokenLayout.trusted(layout.cu_seqlens, cells, layout.grid, layout.num_prefix)


torch.serialization.add_safe_globals([Stage, Trace])  # for torch.load with weights_only=True, its default
