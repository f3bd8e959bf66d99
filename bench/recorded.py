"""Modules that work as in a free run and then take recorded decisions, so that a clock, and a CUDA graph, has all of a free run's work.

`forward(images, replay=...)` would not ask the policy.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from step_kernels import Halting, SupertokenLayout
from step_kernels.model import LinearExit, Stage


class Given(nn.Module):
    """A policy that asks another one, if there is one, drops its answer and returns `layout`."""

    def __init__(self, layout: SupertokenLayout, asked: nn.Module | None = None) -> None:
        super().__init__()
        self.layout, self.asked = layout, asked

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int = 0) -> SupertokenLayout:
        if self.asked is not None:
            self.asked(images, patch_size=patch_size, num_prefix=num_prefix)
        return self.layout


class KnownExit(LinearExit):
    """An exit with the parameters of `head` that halts whom it is told.

    Where the survivors' layout is trimmed, the host knows it: nothing waits for the device, and a CUDA graph can have exactly these sizes.
    """

    def __init__(self, head: LinearExit, stage: Stage) -> None:
        super().__init__(head.dim, head.num_classes, keep_per_class=head.keep_per_class)
        self.norm, self.head, self.threshold, self.stage = head.norm, head.head, head.threshold, stage

    def halt(
        self, tokens: Tensor, layout: SupertokenLayout, *, canvas: Tensor, halted: Tensor | None = None
    ) -> Halting:
        recorded, known = self.stage.halted[: layout.capacity], self.stage.layout
        halting = super().halt(tokens, layout, canvas=canvas, halted=recorded)
        if not known.trimmed:
            return halting
        return dataclasses.replace(halting, layout=known, rows=halting.rows[: known.capacity])
