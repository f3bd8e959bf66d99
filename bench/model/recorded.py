"""Modules that do a policy's or an exit's work and then return a recorded decision.

So the clock sees all the work of a free run, syncs included, in every mode of the model, while every contender takes the same
decisions. `forward(images, replay=...)` would not ask the policy.

Decisions held at full capacity are trimmed by the model in exact mode, as a free run's are; trimmed ones carry their sizes, which
the host then knows: nothing waits for the device, and a CUDA graph can be captured at exactly these sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from step_kernels import Halting, SupertokenLayout
from step_kernels.model import LinearDecoder, LinearExit, Policy, Stage, StepEncoder, StepSegmenter, Trace, ViT


class RecordedPolicy(Policy):
    """Asks a policy, drops its answer and returns `layout`; without a policy, just that.

    Attributes:
        inner: the policy that is asked, or None.
        layout: the answer.
    """

    layout: SupertokenLayout

    def __init__(self, inner: Policy | None) -> None:
        super().__init__((2,) if inner is None else inner.sides)
        self.inner = inner

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int = 0) -> SupertokenLayout:
        if self.inner is not None:
            self.inner(images, patch_size=patch_size, num_prefix=num_prefix)
        return self.layout

    def flops(self, images_shape: Sequence[int], *, patch_size: int) -> int:
        return 0 if self.inner is None else self.inner.flops(images_shape, patch_size=patch_size)


class RecordedExit(LinearExit):
    """A linear exit, with the parameters of `head`, whose decision is that of `stage`."""

    stage: Stage

    def __init__(self, head: LinearExit) -> None:
        super().__init__(head.dim, head.num_classes, keep_per_class=head.keep_per_class)
        self.norm, self.head, self.threshold = head.norm, head.head, head.threshold

    def halt(
        self, tokens: Tensor, layout: SupertokenLayout, *, canvas: Tensor, halted: Tensor | None = None
    ) -> Halting:
        recorded = self.stage.halted[: layout.capacity] if halted is None else halted
        halting = super().halt(tokens, layout, canvas=canvas, halted=recorded)
        known = self.stage.layout
        if not known.trimmed:
            return halting
        return dataclasses.replace(halting, layout=known, rows=halting.rows[: known.capacity])


class RecordedModel:
    """A segmenter that repeats the decisions it was last given.

    Args:
        vit, decoder: shared, not copied.
        policy: what is asked about the layout and not listened to, or None.
        exits: {block: head}.

    Attributes:
        segmenter: in eval mode.
    """

    def __init__(self, vit: ViT, decoder: LinearDecoder, policy: Policy | None, exits: dict[int, LinearExit]) -> None:
        self._policy = RecordedPolicy(policy)
        self._exits = {block: RecordedExit(head) for block, head in exits.items()}
        self.segmenter = StepSegmenter(StepEncoder(vit, self._policy, self._exits), decoder).eval()

    def hold(self, trace: Trace) -> None:
        """Repeat these decisions from now on; the tensors are used as they are, not copied."""
        self._policy.layout = trace.layout
        for (block, own), stage in zip(self._exits.items(), trace.stages, strict=True):
            if stage.block != block:
                raise ValueError(f"trace: expected a stage after block {block}, got one after block {stage.block}")
            own.stage = stage

    def load(self, decisions: Sequence[Tensor]) -> None:
        """Copy other decisions over the held ones, of the same capacities, as `decision_tensors` gives them."""
        held = Trace(self._policy.layout, tuple(own.stage for own in self._exits.values()))
        torch._foreach_copy_(decision_tensors(held), list(decisions))


@torch.no_grad()
def decide_freely(
    vit: ViT,
    decoder: LinearDecoder,
    exits: dict[int, LinearExit],
    images: Tensor,
    layout: SupertokenLayout,
    threshold: float,
    *,
    static: bool = False,
) -> Trace:
    """The decisions of a run on a given layout whose exits halt by their own confidence, above `threshold`."""
    policy = RecordedPolicy(None)
    policy.layout = layout
    heads = {}
    for block, head in exits.items():
        heads[block] = LinearExit(head.dim, head.num_classes, threshold=threshold, keep_per_class=head.keep_per_class)
        heads[block].norm, heads[block].head = head.norm, head.head
        heads[block].to(head.threshold.device)
    segmenter = StepSegmenter(StepEncoder(vit, policy, heads), decoder).eval()
    return segmenter.decide_and_predict(images, static=static)[1]


def decision_tensors(trace: Trace) -> list[Tensor]:
    """What a free run decides: the layout at the input, and who halts."""
    return [trace.layout.cu_seqlens, trace.layout.cells, *(stage.halted for stage in trace.stages)]


def own_copy(trace: Trace) -> Trace:
    """The decisions at full capacity, in memory of their own, ready to be loaded over.

    Layouts of the survivors are not copied: the model works them out itself.
    """
    full = trace.untrim()
    layout = dataclasses.replace(
        full.layout, cu_seqlens=full.layout.cu_seqlens.clone(), cells=full.layout.cells.clone()
    )
    return Trace(layout, tuple(dataclasses.replace(stage, halted=stage.halted.clone()) for stage in full.stages))
