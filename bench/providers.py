"""The contenders and their registry: each is built from the same `Case`, and later ones register in the same way.

All share one output tail, `step_kernels.upsample_argmax`, so that a faster tail is not credited to saved tokens; it is also
timed alone, because it is part of every time and of no FLOP count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from step_kernels import SupertokenLayout, upsample_argmax
from step_kernels.model import StepEncoder, StepSegmenter, Trace

from .case import Case
from .settings import PATCH_SIZE


@dataclass(frozen=True)
class Contender:
    """One way to compute the labels of a case.

    Attributes:
        name: in the registry and in the table.
        model: what it must compute: the oracle reads its parameters, the FLOP count its parts.
        traces: the recorded decisions, one for each input of the case.
        scores: (images, trace) -> class scores [batch, classes, rows, cols], checked by the gate.
        labels: (images, trace) -> labels [batch, size, size], checked by the gate and timed.
        decide: images -> the decisions of a free run; None for a contender that decides nothing.
    """

    name: str
    model: StepSegmenter
    traces: tuple[Trace, ...]
    scores: Callable[[Tensor, Trace], Tensor]
    labels: Callable[[Tensor, Trace], Tensor]
    decide: Callable[[Tensor], Trace] | None


Builder = Callable[[Case], Contender | None]
REGISTRY: dict[str, Builder] = {}


def provider(name: str) -> Callable[[Builder], Builder]:
    """Registers a builder under a name; it returns None where its contender makes no sense in a case.

    Raises:
        ValueError: the name is taken.
    """

    def register(builder: Builder) -> Builder:
        if name in REGISTRY:
            raise ValueError(f"name: expected one that is not registered yet, got {name!r}")
        REGISTRY[name] = builder
        return builder

    return register


def build_contenders(case: Case) -> list[Contender]:
    """Every registered contender that makes sense in this case, in the order of registration."""
    built = (builder(case) for builder in REGISTRY.values())
    return [contender for contender in built if contender is not None]


@provider("dense")
def dense(case: Case) -> Contender:
    """The baseline: the ViT and the linear decoder in plain PyTorch with SDPA, no op of the package before the tail."""
    layout = SupertokenLayout.uniform(
        case.inputs[0].shape[0], case.grid, num_prefix=case.vit.num_prefix, device=case.inputs[0].device
    )

    @torch.no_grad()
    def scores(images: Tensor, trace: Trace) -> Tensor:
        every_token = case.decoder.head(case.vit(images))
        return every_token[:, case.vit.num_prefix :].transpose(1, 2).unflatten(2, case.grid)

    def labels(images: Tensor, trace: Trace) -> Tensor:
        return upsample_argmax(scores(images, trace), (images.shape[2], images.shape[3]))

    model = StepSegmenter(StepEncoder(case.vit), case.decoder).eval()
    return Contender("dense", model, tuple(Trace(layout) for _ in case.inputs), scores, labels, decide=None)


@provider("merged")
def merged(case: Case) -> Contender | None:
    """Fewer tokens from the policy, no exits."""
    if case.policy is None:
        return None
    return _step_contender("merged", case, StepSegmenter(StepEncoder(case.vit, case.policy), case.decoder))


@provider("merged + exits")
def merged_with_exits(case: Case) -> Contender | None:
    """Fewer tokens from the policy, and confident ones halt at the exits."""
    if case.policy is None or not case.exits:
        return None
    model = StepSegmenter(StepEncoder(case.vit, case.policy, case.exits), case.decoder)
    return _step_contender("merged + exits", case, model)


@provider("exits")
def exits_alone(case: Case) -> Contender | None:
    """Every patch a token, confident ones halt: what is left of "merged + exits" without a policy."""
    if case.policy is not None or not case.exits:
        return None
    return _step_contender("exits", case, StepSegmenter(StepEncoder(case.vit, exits=case.exits), case.decoder))


def _step_contender(name: str, case: Case, model: StepSegmenter) -> Contender:
    model.eval()
    executed = case.policy if case.settings.policy != "given" else None

    @torch.no_grad()
    def scores(images: Tensor, trace: Trace) -> Tensor:
        return model(images, replay=trace)

    @torch.no_grad()
    def labels(images: Tensor, trace: Trace) -> Tensor:
        if executed is not None:
            # A replayed run does not ask the policy. It is asked here and its answer dropped, so that the clock sees the
            # same work as in a free run while every contender takes the recorded decisions.
            executed(images, patch_size=PATCH_SIZE, num_prefix=case.vit.num_prefix).trim()
        return model.predict(images, replay=trace)

    traces = tuple(_decided(model, images) for images in case.inputs)
    return Contender(name, model, traces, scores, labels, decide=model.trace)


@torch.no_grad()
def _decided(model: StepSegmenter, images: Tensor) -> Trace:
    """`StepSegmenter.trace`; where no exit decides, of the policy alone, without the blocks behind it."""
    encoder = model.encoder
    if encoder.policy is None or encoder.exits:
        return model.trace(images)
    return Trace(encoder.policy(images, patch_size=PATCH_SIZE, num_prefix=encoder.vit.num_prefix).trim())


def tail_alone(case: Case, contender: Contender) -> Callable[[int], Tensor]:
    """The output tail on the class scores of the first input, which the contender has computed before: input number -> labels."""
    computed = contender.scores(case.inputs[0], contender.traces[0])
    return lambda number: upsample_argmax(computed, (case.settings.size, case.settings.size))
