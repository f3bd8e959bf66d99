"""The one difference between exact and static mode: whether layouts are cut to the live count, which waits for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from .. import Halting, SupertokenLayout
from ..checks import check_choice, check_int, describe

__all__ = ["Sizing"]

Sized = TypeVar("Sized", SupertokenLayout, Halting)


@dataclass(frozen=True)
class Sizing:
    """How a run settles the size of each stage: after the merge (stage 0) and after each exit (stages 1, 2, ...).

    Attributes:
        static: leave capacities as they are; else trim (one host sync each).
        expected_tokens: static mode: live rows of each stage in an earlier run, by which kernels choose tiles. None: unknown.
    """

    static: bool = False
    expected_tokens: tuple[int, ...] | None = None

    @classmethod
    def checked(cls, static: bool, expected_tokens: Sequence[int] | None, stages: int) -> Sizing:
        """From a caller's arguments, for a run of ``stages`` stages.

        Raises:
            TypeError, ValueError: an argument of a wrong type, counts without ``static``, or not one for each stage.
            RuntimeError: static mode with gradients enabled.
        """
        check_choice("static", static, (True, False))
        if static and torch.is_grad_enabled():
            raise RuntimeError("static mode is for inference: expected gradients to be disabled (torch.no_grad)")
        if expected_tokens is None:
            return cls(static)
        if not static:
            raise ValueError("expected_tokens: expected None in exact mode, whose counts are read, got some")
        if not isinstance(expected_tokens, (list, tuple)):
            raise TypeError(f"expected_tokens: expected a sequence of ints, got {describe(expected_tokens)}")
        if len(expected_tokens) != stages:
            raise ValueError(
                f"expected_tokens: expected {stages} counts, one after the merge and after each exit, "
                f"got {len(expected_tokens)}"
            )
        counts = [check_int(f"expected_tokens[{i}]", count, minimum=0) for i, count in enumerate(expected_tokens)]
        return cls(static, tuple(counts))

    def settle(self, stage: Sized, number: int) -> Sized:
        """``stage`` with the size that its tokens have from here on."""
        if not self.static:
            return stage.trim()
        if self.expected_tokens is None:
            return stage
        if isinstance(stage, Halting):
            return replace(stage, layout=self.settle(stage.layout, number))
        return stage if stage.trimmed else replace(stage, expected_tokens=self.expected_tokens[number])
