"""Whole segmenters, for the jobs that compare them: one set of weights, rotating inputs, recorded decisions, and what must come out.

A family is what is done about tokens: nothing ("dense"), "merged", "exits", or "merged + exits". Its contenders repeat the same decisions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels import SupertokenLayout, use_backend
from step_kernels.model import (
    EncoderOutput,
    LinearDecoder,
    LinearExit,
    Policy,
    PolicyNet,
    StepEncoder,
    StepSegmenter,
    Trace,
    ViT,
    count_flops,
)

from . import oracle
from .engine import Contender
from .gate import Expected, Outputs, regret, regret_of_rounding
from .layouts import HALT_SHARE, gone_at, without_merging
from .options import PATCH_SIZE, Options

DENSE, MERGED, EXITS, MERGED_EXITS = "dense", "merged", "exits", "merged + exits"
CLASSES = 150  # as ADE20K, the usual data set of dense prediction
SEED = 0
LARGEST_INDEX = 2**31  # PyTorch's kernel for upsampling counts in int32


@dataclass(frozen=True, eq=False)
class Weights:
    """One model for images of one size, in eval mode.

    Attributes:
        name: preset of the ViT.
        vit, decoder: of every family.
        policy: what merges.
        exits: {block number: head}, one at 2/3 of the depth.
    """

    name: str
    vit: ViT
    decoder: LinearDecoder
    policy: Policy
    exits: dict[int, LinearExit]


@torch.no_grad()
def draw_weights(options: Options, name: str, size: int, classes: int = CLASSES) -> Weights:
    """Random weights, the same numbers on every device and in every dtype; the policy is a `PolicyNet` as deployed."""
    torch.manual_seed(SEED)
    vit = ViT.preset(name, img_size=size)
    decoder = LinearDecoder(vit.embed_dim, classes)
    exits = {vit.depth * 2 // 3: LinearExit(vit.embed_dim, classes)}
    for module in (vit, decoder, *exits.values()):
        for parameter in module.parameters():
            if parameter.ndim == 1:  # off zeros and ones, with which a contender that forgets a bias would pass
                parameter.add_(0.02 * torch.randn(parameter.shape))
    policy = PolicyNet()
    for part in (vit, decoder, policy, *exits.values()):
        part.to(device=options.device, dtype=options.dtype).eval()
    return Weights(name, vit, decoder, policy.deployed(), exits)


def draw_inputs(options: Options, batch: int, size: int) -> tuple[Tensor, ...]:
    """Random images [batch, 3, size, size], never zeros: a GPU multiplies zeros faster. Eight batches on a GPU, three on a CPU."""
    generator = torch.Generator(options.device).manual_seed(SEED)
    shape = (batch, 3, size, size)
    return tuple(
        torch.randn(shape, generator=generator, device=options.device).to(options.dtype)
        for _ in range(8 if options.device.type == "cuda" else 3)
    )


class Given(nn.Module):
    """A policy whose answer is known: asks another one, if there is one, drops its answer and returns `layout`."""

    layout: SupertokenLayout

    def __init__(self, layout: SupertokenLayout, asked: nn.Module | None = None) -> None:
        super().__init__()
        self.layout, self.asked = layout, asked

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int = 0) -> SupertokenLayout:
        if self.asked is not None:
            self.asked(images, patch_size=patch_size, num_prefix=num_prefix)
        return self.layout


@dataclass(frozen=True, eq=False)
class Segmenters:
    """All families of one model on the same inputs.

    Attributes:
        weights: shared by all.
        inputs: the batches that rotate, [batch, 3, size, size] each.
        traces: decisions of "merged + exits", trimmed, one for each input. Those of the other families follow from them.
    """

    weights: Weights
    inputs: tuple[Tensor, ...]
    traces: tuple[Trace, ...]
    _dense: Segmenters | None = None
    _known: dict[tuple[str, str, int], Any] = field(default_factory=dict)

    def at(self, traces: tuple[Trace, ...]) -> Segmenters:
        """The same model and inputs at other decisions; the dense model's truths are shared."""
        return Segmenters(self.weights, self.inputs, traces, self)

    @property
    def batch(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.inputs[0].shape[2], self.inputs[0].shape[3]

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def model(self, family: str, vit: ViT | None = None) -> StepSegmenter:
        """What contenders of a family must compute; `vit` may stand in for the one of the weights."""
        policy = self.weights.policy if family in (MERGED, MERGED_EXITS) else None
        exits = self.weights.exits if family in (EXITS, MERGED_EXITS) else {}
        return StepSegmenter(StepEncoder(vit or self.weights.vit, policy, exits), self.weights.decoder).eval()

    def decisions(self, family: str) -> tuple[Trace, ...]:
        """What contenders of a family repeat, one for each input."""
        if family == MERGED_EXITS:
            return self.traces
        if family == MERGED:
            return tuple(Trace(trace.layout) for trace in self.traces)
        if family == EXITS:
            return self._once("decisions", family, lambda: tuple(map(without_merging, self.traces)))
        grid = self.size[0] // PATCH_SIZE, self.size[1] // PATCH_SIZE
        uniform = SupertokenLayout.uniform(self.batch, grid, num_prefix=self.weights.vit.num_prefix, device=self.device)
        return tuple(Trace(uniform) for _ in self.inputs)

    def eager(
        self, family: str, vit: ViT | None = None, *, static: bool = False, ask: bool = True
    ) -> Callable[[int], Tensor]:
        """Number of an input -> labels, launched op by op.

        Args:
            family: of the model.
            vit: see `model`.
            static: nothing is cut to the live size.
            ask: whether the policy does its work, although its answer is known.
        """
        model, traces = self.model(family, vit), self.decisions(family)
        policy, num_prefix = model.encoder.policy, self.weights.vit.num_prefix
        replays = [trace.untrim() for trace in traces] if static else traces

        @torch.no_grad()
        def labels(number: int) -> Tensor:
            images = self.inputs[number]
            if ask and policy is not None:  # a replayed run does not ask it
                decided = policy(images, patch_size=PATCH_SIZE, num_prefix=num_prefix)
                if not static:
                    decided.trim()  # the sync that its answer takes
            return model.predict(images, replay=replays[number], static=static)

        return labels

    def contender(
        self, family: str, call: Callable[[int], Any], *, ours: bool, note: str = "", held_bytes: int = 0
    ) -> Contender:
        """One that computes a family's labels [batch, height, width]."""
        return Contender(
            call,
            view=functools.partial(self.view, family),
            ours=ours,
            note=note,
            expected=self.expected(family),
            flops=self._once("flops", family, lambda: self.flops(family)),
            facts=self._once("facts", family, lambda: self.facts(family)),
            held_bytes=held_bytes,
        )

    def judged(self, number: int) -> int:
        """The image of an input that is held to the truth: another one for the next input."""
        return number % self.batch

    def truth(self, family: str, number: int) -> tuple[Tensor, float]:
        """Scores [1, classes, rows, cols] of the judged image in fp64, and the regret that plain PyTorch's errors explain."""
        if family == DENSE and self._dense is not None:
            return self._dense.truth(family, number)

        def find() -> tuple[Tensor, float]:
            image, model = self.judged(number), self.model(family)
            images, trace = self.inputs[number][image : image + 1], self.decisions(family)[number].image(image)
            scores = oracle.segment(copy.deepcopy(model).double(), images.double(), trace)
            return scores, float(regret_of_rounding(oracle.segment(model, images, trace), scores).max())

        return self._once("truth", family, find, number)

    def view(self, family: str, labels: Tensor, number: int) -> Outputs:
        """The regret of the judged image's labels [1, height, width]."""
        image = self.judged(number)
        return (regret(labels[image : image + 1], at_full_size(self.truth(family, number)[0], self.size)),)

    def expected(self, family: str) -> Expected:
        """No regret. Upsampling mixes scores of neighbours, so their largest error bounds that of the mixture."""

        def truth(number: int) -> Outputs:
            return (torch.zeros(1, *self.size, dtype=torch.float64, device=self.device),)

        def plain(number: int) -> Outputs:
            return (self.inputs[0].new_full((1, *self.size), self.truth(family, number)[1], dtype=torch.float32),)

        return self._once("expected", family, lambda: Expected(truth, plain))

    def flops(self, family: str) -> float:
        """Of one call, mean over the inputs: matmuls and convolutions, 1 MAC = 2 FLOPs, without the tail.

        Counting computes: inputs whose images have the same numbers of tokens, such as mirrored ones, are counted once.
        """
        model, shape = self.model(family), tuple(self.inputs[0].shape)
        found: dict[tuple[int, ...], int] = {}
        flops = []
        for trace in self.decisions(family):
            key = tuple(sorted(trace.layout.lengths().tolist()))
            if key not in found:
                found[key] = count_flops(model, shape, trace).total
            flops.append(found[key])
        return sum(flops) / len(flops)

    def facts(self, family: str) -> dict[str, float]:
        """Tokens of an image without its prefix tokens, the share of them that halts, and how many free exits would decide otherwise."""
        traces, prefix = self.decisions(family), self.weights.vit.num_prefix
        tokens = [int(length) - prefix for trace in traces for length in trace.layout.lengths()]
        left = [int(length) - prefix for trace in traces for length in trace.final_layout.lengths()]
        facts: dict[str, float] = {
            "tokens_mean": sum(tokens) / len(tokens),
            "tokens_min": min(tokens),
            "tokens_max": max(tokens),
            "halted_share": 1 - sum(left) / sum(tokens),
        }
        return facts | ({"share_decided_differently": self.decided_differently()} if family == MERGED_EXITS else {})

    def decided_differently(self) -> float:
        """Share of the first image's patches that an exit which is free to decide halts in the run's dtype and not in fp64, or the reverse.

        Merging is the recorded one, and the threshold lets fp64 halt as many as halt elsewhere.
        """
        images, layout, exact = self.inputs[0][:1], self.traces[0].layout.image(0), copy.deepcopy(self.weights)
        for module in (exact.vit, *exact.exits.values()):
            module.double()
        with use_backend("reference"):  # other floors have no fp64
            threshold = threshold_for(confidences(exact, images.double(), layout), HALT_SHARE)
            truth = freely(exact, images.double(), layout, threshold).trace
        own = freely(self.weights, images, layout, threshold).trace
        differ = gone_at(truth, truth.stages[0]) != gone_at(own, own.stages[0])
        return float(differ.double().mean())

    def _once(self, what: str, family: str, find: Callable[[], Any], number: int = 0) -> Any:
        key = what, family, number
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]


def at_full_size(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def plain_upsample_argmax(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The output tail in plain PyTorch: int64 labels [batch, height, width]."""
    if scores.shape[0] * scores.shape[1] * size[0] * size[1] >= LARGEST_INDEX:
        return torch.cat([plain_upsample_argmax(image, size) for image in scores.split(1)])
    return at_full_size(scores, size).argmax(1)


@torch.no_grad()
def freely(weights: Weights, images: Tensor, layout: SupertokenLayout, threshold: float) -> EncoderOutput:
    """A run on a given layout whose exit halts by its own confidence, above `threshold`."""
    heads = copy.deepcopy(weights.exits)
    for head in heads.values():
        head.threshold.fill_(threshold)
    return StepEncoder(weights.vit, Given(layout), heads).eval()(images)


def confidences(weights: Weights, images: Tensor, layout: SupertokenLayout) -> Tensor:
    """The exit's largest class probability for each token of a trimmed layout, in the weights' dtype; zero for prefix tokens."""
    canvas = freely(weights, images, layout, 0.0).canvas  # everybody leaves, and leaves log-probabilities
    assert canvas is not None
    image, row, col, side = layout.cells.long().unbind(1)
    return torch.where(side > 0, canvas.amax(1)[image, row, col].exp(), 0)


def threshold_for(confidence: Tensor, share: float) -> float:
    """A threshold that this share of the tokens exceeds, halfway to the next value so that rounding flips few decisions.

    Args:
        confidence: [tokens], zero for prefix tokens, which do not count.
        share: from 0 to 1.
    """
    ordered = confidence[confidence > 0].double().sort(descending=True).values
    count = round(share * ordered.numel())
    if count <= 0:
        return 1.0
    return float((ordered[count - 1] + ordered[count]) / 2) if count < ordered.numel() else 0.0
