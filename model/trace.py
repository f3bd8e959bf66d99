"""A run's decisions, as data: which tokens were merged and which halted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import SupertokenLayout
from ..checks import check_device, check_tensor, describe

if TYPE_CHECKING:
    from .flops import FlopCount

__all__ = ["Batch", "Stage", "Trace"]

ROWS = ("halted", "confidence", "labels")  # of a stage: a row for each token before it


@dataclass(frozen=True, eq=False)
class Stage:
    """What one exit decided.

    Attributes:
        block: the exit comes after this block (1-based).
        halted: bool [tokens before the exit]; True where the token left.
        layout: the survivors' layout.
        confidence, labels: fp32 and int32 of the same length, each token's largest class probability and its class (prefix tokens: 0
            and -1); None in decisions made by hand.
    """

    block: int
    halted: Tensor
    layout: SupertokenLayout
    confidence: Tensor | None = None
    labels: Tensor | None = None

    def over(self, layout: SupertokenLayout, change: Callable[..., Any], *given: Any) -> Stage:
        """``change(tensor, *given)`` of each tensor with a row per token before the exit; ``layout`` behind it."""
        rows = {name: change(getattr(self, name), *given) for name in ROWS if getattr(self, name) is not None}
        return replace(self, layout=layout, **rows)


@dataclass(frozen=True, eq=False)
class Trace:
    """The decisions of one forward pass: ``forward(images, replay=trace)`` repeats them, `figure` draws them, `summary` counts them.

    A rounding error flips an exit's decision now and then, so two implementations can only be compared at equal decisions.
    ``torch.save`` and ``torch.load`` take a trace as it is, `save` and `load` a file that NumPy reads. A run in static mode
    leaves an untrimmed trace, with no host sync; `trim` and `untrim` lead from one mode to the other.

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
        stages, before = list[Stage](), self.layout
        for stage in self.stages:
            own = before.image_rows(number)
            stages.append(stage.over(stage.layout.image(number), lambda rows, own: rows[own].clone(), own))
            before = stage.layout
        return Trace(self.layout.image(number), tuple(stages))

    def clone(self) -> Trace:
        """The same decisions in memory of their own."""
        stages = (stage.over(stage.layout.clone(), Tensor.clone) for stage in self.stages)
        return Trace(self.layout.clone(), tuple(stages))

    def to(self, device: torch.device | str) -> Trace:
        """The same decisions on another device."""
        stages = (stage.over(stage.layout.to(device), Tensor.to, device) for stage in self.stages)
        return Trace(self.layout.to(device), tuple(stages))

    def tensors(self) -> list[Tensor]:
        """Every tensor that a replay reads, in an order that depends on the number of stages alone."""
        layouts = [self.layout, *(stage.layout for stage in self.stages)]
        found = [tensor for layout in layouts for tensor in (layout.cu_seqlens, layout.cells)]
        return found + [stage.halted for stage in self.stages]

    def trim(self) -> Trace:
        """The same decisions, every tensor cut to its live rows, as exact mode takes them. One host sync for each layout."""
        layouts = [self.layout.trim(), *(stage.layout.trim() for stage in self.stages)]
        steps = zip(self.stages, layouts, layouts[1:], strict=False)
        stages = (stage.over(after, Tensor.narrow, 0, 0, before.capacity) for stage, before, after in steps)
        return Trace(layouts[0], tuple(stages))

    def untrim(self) -> Trace:
        """The same decisions at full capacity, B * (num_prefix + rows * cols) rows each, as static mode takes them. No host sync."""
        most = full_capacity(self.layout)
        stages = (stage.over(untrimmed(stage.layout), padded, most) for stage in self.stages)
        return Trace(untrimmed(self.layout), tuple(stages))

    def exit_blocks(self) -> Tensor:
        """The block after which each cell's token halted: int32 [B, rows, cols], 0 where it reached the end. No host sync."""
        found = torch.zeros_like(self.layout.sides())
        for stage in reversed(self.stages):
            found = torch.where(stage.layout.sides() > 0, found, stage.block)
        return found

    def summary(self, flops: FlopCount | None = None) -> dict[str, Any]:
        """Counts over the batch without prefix tokens: ``images``, ``patches``, ``sides`` (tokens after the merge by block side) and ``stages``.

        A stage is the merge (``block`` 0) or the exit after ``block``: how many ``halted`` there, the ``tokens`` that go on, and with
        ``flops``, of `count_flops`, the ``gflops`` up to the next exit's decision or the end. Waits for the host.
        """
        size, (rows, cols) = self.layout.batch_size, self.layout.grid
        left = [count - size * self.layout.num_prefix for count in self.token_counts()]
        steps = zip((0, *(stage.block for stage in self.stages)), left[:1] + left, left, strict=False)
        stages = [dict[str, Any](block=block, halted=before - after, tokens=after) for block, before, after in steps]
        for stage, count in zip(stages, flops.stages if flops else (), strict=False):
            stage["gflops"] = count / 1e9
        sides, counts = self.layout.trim().cells[:, 3].unique(return_counts=True)
        found = {side: count for side, count in zip(sides.tolist(), counts.tolist(), strict=True) if side}
        return {"images": size, "patches": size * rows * cols, "sides": found, "stages": stages}

    def figure(self, images: Tensor, titles: Sequence[str] | None = None) -> Any:
        """A matplotlib figure of the run's images ([B, 3, H, W], uint8, or of any scale, which is stretched to what can be shown) with their
        supertokens, coloured by side, those tinted that halted. Waits for the host.
        """
        from .cli.drawing import figure  # it draws traces: above this file

        return figure(self, images, titles)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed .npz of the trimmed trace: ``grid``, ``num_prefix``, ``blocks``, the merge's ``cu_seqlens`` and ``cells``; of exit i
        ``halted_i``, ``confidence_i`` and ``labels_i``, a row for each token before it. Waits for the host.
        """
        trace = self.trim().to("cpu")
        layout, blocks, told = trace.layout, [stage.block for stage in trace.stages], dict[str, Any]()
        for i, stage in enumerate(trace.stages):
            told |= {f"{name}_{i}": getattr(stage, name) for name in ROWS if getattr(stage, name) is not None}
        told |= {name: getattr(layout, name) for name in ("grid", "num_prefix", "cu_seqlens", "cells")}
        np.savez_compressed(path, blocks=np.array(blocks, np.int64), **told)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """What `save` wrote, on the CPU. ValueError where the file is another one."""
        with np.load(path) as file:
            found = {name: torch.from_numpy(np.atleast_1d(file[name])) for name in file.files}
        needed = {"grid", "num_prefix", "blocks", "cu_seqlens", "cells"}
        needed |= {f"halted_{i}" for i in range(len(found.get("blocks", ())))}
        if missing := needed - found.keys():
            raise ValueError(f"{path}: expected a file of Trace.save, got one without {', '.join(sorted(missing))}")
        rows, cols, prefix = *found["grid"].tolist(), int(found["num_prefix"])
        trace = cls(SupertokenLayout(found["cu_seqlens"], found["cells"], (rows, cols), prefix, trimmed=True))
        for i, block in enumerate(found["blocks"].tolist()):
            told = {name: found[f"{name}_{i}"] for name in ROWS if f"{name}_{i}" in found}
            before, stays = trace.final_layout, ~told["halted"]
            survivors = F.pad(stays.cumsum(0), (1, 0))[before.cu_seqlens.long()].int()
            after = SupertokenLayout.trusted(survivors, before.cells[stays], before.grid, prefix, trimmed=True)
            trace = cls(trace.layout, (*trace.stages, Stage(block, layout=after, **told)))
        return trace

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


def full_capacity(layout: SupertokenLayout) -> int:
    """Rows that suffice for any decision on this layout's batch and grid."""
    return layout.batch_size * layout.max_seqlen


def padded(rows: Tensor, capacity: int) -> Tensor:
    """A row for each token, and zeros in the spare ones."""
    spare = capacity - rows.shape[0]
    return F.pad(rows, (*[0, 0] * (rows.dim() - 1), 0, spare)) if spare > 0 else rows


def untrimmed(layout: SupertokenLayout) -> SupertokenLayout:
    """The same layout at full capacity, spare rows zero."""
    cells = padded(layout.cells, full_capacity(layout))
    return SupertokenLayout.trusted(layout.cu_seqlens, cells, layout.grid, layout.num_prefix)


torch.serialization.add_safe_globals([Stage, Trace])  # for torch.load with weights_only=True, its default
