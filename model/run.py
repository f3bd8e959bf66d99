"""A run to come: its images, and who decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .. import Halting, SupertokenLayout
from ..checks import check_choice, check_int, describe
from .trace import Batch, Trace

__all__ = ["Run"]

Sized = TypeVar("Sized", SupertokenLayout, Halting)


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
