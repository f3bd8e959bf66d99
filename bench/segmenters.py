"""Whole segmenters, for the jobs that compare them: one set of weights, rotating inputs, recorded decisions, and what must come out.

A family is what is done about tokens: nothing ("dense"), "merged", "exits", or "merged + exits". Its contenders repeat the same decisions.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels import Halting, SupertokenLayout, use_backend
from step_kernels.model import LinearDecoder, LinearExit, Policy, PolicyNet, StepEncoder, StepSegmenter, Trace, ViT
from step_kernels.model.flops import count_flops

from . import oracle
from .engine import Contender, NotRun
from .gate import Expected, Outputs, regret, regret_of_rounding
from .layouts import HALT_SHARE, without_merging
from .options import PATCH_SIZE, Options

DENSE, MERGED, EXITS, MERGED_EXITS = "dense", "merged", "exits", "merged + exits"
CLASSES = 150  # as ADE20K, the usual data set of dense prediction
SEED = 0
Labels = Callable[[int], Tensor]  # number of an input -> labels [batch, height, width]
LARGEST_INDEX = 2**31  # PyTorch's kernel for upsampling counts in int32


@dataclass(frozen=True, eq=False)
class Weights:
    """One model for images of one size, in eval mode."""

    vit: ViT
    decoder: LinearDecoder
    policy: Policy  # what merges
    exits: dict[int, LinearExit]  # block number -> head; one, at 2/3 of the depth

    def to(self, **where: Any) -> Weights:
        """A copy on another device or in another dtype."""
        other = copy.deepcopy(self)
        for module in (other.vit, other.decoder, other.policy, *other.exits.values()):
            module.to(**where).eval()
        return other


@torch.no_grad()
def draw_weights(options: Options, name: str, size: int) -> Weights:
    """Random weights, the same numbers on every device and in every dtype; the policy is a `PolicyNet` as deployed."""
    torch.manual_seed(SEED)
    vit = ViT.preset(name, img_size=size)
    decoder, head = LinearDecoder(vit.embed_dim, CLASSES), LinearExit(vit.embed_dim, CLASSES)
    for parameter in (*vit.parameters(), *decoder.parameters(), *head.parameters()):
        if parameter.ndim == 1:  # off zeros and ones, with which a contender that forgets a bias would pass
            parameter.add_(0.02 * torch.randn(parameter.shape))
    weights = Weights(vit, decoder, PolicyNet().eval().deployed(), {vit.depth * 2 // 3: head})
    return weights.to(device=options.device, dtype=options.dtype)


def draw_inputs(options: Options, batch: int, size: int) -> tuple[Tensor, ...]:
    """Random images [batch, 3, size, size], never zeros: a GPU multiplies zeros faster. Eight batches on a GPU, three on a CPU."""
    generator = torch.Generator(options.device).manual_seed(SEED)
    shape, count = (batch, 3, size, size), 8 if options.device.type == "cuda" else 3
    drawn = (torch.randn(shape, generator=generator, device=options.device) for _ in range(count))
    return tuple(images.to(options.dtype) for images in drawn)


class Given(nn.Module):
    """A policy that asks another one, if there is one, drops its answer and returns `layout`. A replay would not ask."""

    def __init__(self, layout: SupertokenLayout, asked: nn.Module | None) -> None:
        super().__init__()
        self.layout, self.asked = layout, asked

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int) -> SupertokenLayout:
        if self.asked is not None:
            self.asked(images, patch_size=patch_size, num_prefix=num_prefix)
        return self.layout


class KnownExit(LinearExit):
    """An exit with the parameters of `head` that halts whom it is told; a trimmed layout of survivors is known to the host already."""

    def __init__(self, head: LinearExit, halted: Tensor, survivors: SupertokenLayout) -> None:
        super().__init__(head.dim, head.num_classes)
        self.norm, self.head, self.threshold = head.norm, head.head, head.threshold
        self.halted, self.survivors = halted, survivors

    def halt(self, tokens: Tensor, layout: SupertokenLayout, **named: Any) -> Halting:
        halting = super().halt(tokens, layout, **{**named, "halted": self.halted[: layout.capacity]})
        if not self.survivors.trimmed:
            return halting
        return dataclasses.replace(halting, layout=self.survivors, rows=halting.rows[: self.survivors.capacity])


@dataclass(frozen=True, eq=False)
class Segmenters:
    """All families of one model on the same inputs."""

    weights: Weights
    inputs: tuple[Tensor, ...]  # the batches that rotate, [batch, 3, size, size] each
    traces: tuple[Trace, ...]  # what "merged + exits" decides on them, trimmed; the other families' decisions follow

    def __post_init__(self) -> None:
        for name in ("decisions", "truth", "expected", "flops", "facts"):  # found once, for all contenders
            object.__setattr__(self, name, functools.cache(getattr(self, name)))

    @property
    def batch(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.inputs[0].shape[2], self.inputs[0].shape[3]

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def model(self, family: str) -> StepSegmenter:
        """What contenders of a family must compute."""
        policy = self.weights.policy if family in (MERGED, MERGED_EXITS) else None
        exits = self.weights.exits if family in (EXITS, MERGED_EXITS) else {}
        return StepSegmenter(StepEncoder(self.weights.vit, policy, exits), self.weights.decoder).eval()

    def decisions(self, family: str) -> tuple[Trace, ...]:
        """What contenders of a family repeat, one for each input."""
        if family == MERGED_EXITS:
            return self.traces
        if family == MERGED:
            return tuple(Trace(trace.layout) for trace in self.traces)
        if family == EXITS:
            return tuple(map(without_merging, self.traces))
        grid = self.size[0] // PATCH_SIZE, self.size[1] // PATCH_SIZE
        uniform = SupertokenLayout.uniform(self.batch, grid, num_prefix=self.weights.vit.num_prefix, device=self.device)
        return (Trace(uniform),) * len(self.inputs)

    def repeating(self, family: str, trace: Trace, vit: ViT | None = None, *, ask: bool = True) -> StepSegmenter:
        """A model that does a free run's work, the policy's if `ask`, and takes these decisions, whose tensors it reads where they are.

        They are at full capacity, as a free run decides, or trimmed: then nothing waits for the device.
        """
        policy = Given(trace.layout, self.model(family).encoder.policy if ask else None)
        heads = self.weights.exits
        exits = {one.block: KnownExit(heads[one.block], one.halted, one.layout) for one in trace.stages}
        return StepSegmenter(StepEncoder(vit or self.weights.vit, policy, exits), self.weights.decoder).eval()

    def eager(self, family: str, vit: ViT | None = None, *, static: bool = False, ask: bool = True) -> Labels:
        """Launched op by op; static: nothing is cut to the live size."""
        models = [self.repeating(family, trace.untrim(), vit, ask=ask) for trace in self.decisions(family)]
        return lambda number: models[number].predict(self.inputs[number], static=static)

    def op_by_op(self, family: str, *, static: bool = False) -> Contender:
        return self.contender(family, self.eager(family, static=static), ours=True, note="op by op")

    def captured(self, family: str, vit: ViT | None = None) -> Contender:
        """`StepSegmenter.capture`, recorded on the first input and replayed on all."""
        if self.device.type != "cuda":
            raise NotRun("needs a CUDA device")
        decisions = [trace.untrim().tensors() for trace in self.decisions(family)]
        held = self.decisions(family)[0].untrim().clone()
        graph = self.repeating(family, held, vit).capture(self.inputs[0])

        def labels(number: int) -> Tensor:
            torch._foreach_copy_(held.tensors(), decisions[number])
            return graph.predict(self.inputs[number])

        return self.contender(family, labels, ours=vit is None, note="CUDA graph", held_bytes=graph.memory_bytes)

    def contender(self, family: str, call: Labels, *, ours: bool, note: str = "", held_bytes: int = 0) -> Contender:
        """One that computes a family's labels, of which the judged image's largest regret is held to the truth."""

        def view(labels: Tensor, number: int) -> Outputs:
            image, scores = self.judged(number), at_full_size(self.truth(family, number)[0], self.size)
            return (regret(labels[image : image + 1], scores).max(),)

        expected, flops, facts = self.expected(family), self.flops(family), self.facts(family)
        return Contender(call, view, ours, note, expected=expected, flops=flops, facts=facts, held_bytes=held_bytes)

    def judged(self, number: int) -> int:
        """The image of an input that is held to the truth: another one for the next input."""
        return number % self.batch

    def truth(self, family: str, number: int) -> tuple[Tensor, float]:
        """Scores [1, classes, rows, cols] of the judged image in fp64, and the regret that plain PyTorch's errors explain."""
        image, model = self.judged(number), self.model(family)
        images, trace = self.inputs[number][image : image + 1], self.decisions(family)[number].image(image)
        scores = oracle.segment(copy.deepcopy(model).double(), images.double(), trace)
        return scores, float(regret_of_rounding(oracle.segment(model, images, trace), scores).max())

    def expected(self, family: str) -> Expected:
        """No regret. Upsampling mixes scores of neighbours, so their largest error bounds that of the mixture."""
        none = (torch.zeros((), dtype=torch.float64),)
        return Expected(lambda number: none, lambda number: (torch.tensor(self.truth(family, number)[1]),))

    def flops(self, family: str) -> float:
        """Of one call, mean over the inputs: matmuls and convolutions, 1 MAC = 2 FLOPs, without the tail."""
        model, shape, traces = self.model(family), tuple(self.inputs[0].shape), self.decisions(family)
        keys = [tuple(sorted(trace.layout.lengths().tolist())) for trace in traces]
        alike = dict(zip(keys, traces, strict=True))  # mirrored images, say, are counted once, for counting computes
        return sum(keys.count(key) * count_flops(model, shape, alike[key]).total for key in alike) / len(keys)

    def facts(self, family: str) -> dict[str, float]:
        """Tokens of an image without its prefix tokens, the share of them that halts, and how many free exits would decide otherwise."""
        traces, prefix = self.decisions(family), self.weights.vit.num_prefix
        tokens = torch.cat([trace.layout.lengths() - prefix for trace in traces]).tolist()
        left = torch.cat([trace.final_layout.lengths() - prefix for trace in traces]).tolist()
        facts = {"tokens_mean": sum(tokens) / len(tokens), "tokens_min": min(tokens), "tokens_max": max(tokens)}
        facts["halted_share"] = 1 - sum(left) / sum(tokens)
        return facts | ({"share_decided_differently": self.decided_differently()} if family == MERGED_EXITS else {})

    def decided_differently(self) -> float:
        """Share of the first image's patches that an exit halts, at the recorded merge, in the run's dtype or in fp64 but not in both."""
        images, layout = self.inputs[0][:1], self.traces[0].layout.image(0)
        with use_backend("reference"):  # other floors have no fp64
            truth = confidences(self.weights.to(dtype=torch.float64), images.double(), layout)
        threshold = threshold_for(truth, HALT_SHARE)
        differ = (truth > threshold) != (confidences(self.weights, images, layout) > threshold)
        return float((differ * layout.cells[:, 3] ** 2).sum()) / (layout.grid[0] * layout.grid[1])


def dense_scores(weights: Weights, images: Tensor) -> Tensor:
    """The ViT and its linear decoder in plain PyTorch, no op of the package: [batch, classes, rows, cols]."""
    tokens = weights.decoder.head(weights.vit(images))[:, weights.vit.num_prefix :]
    return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // PATCH_SIZE, images.shape[3] // PATCH_SIZE))


def at_full_size(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def plain_upsample_argmax(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The output tail in plain PyTorch: int64 labels [batch, height, width]."""
    if scores.shape[0] * scores.shape[1] * size[0] * size[1] >= LARGEST_INDEX:
        return torch.cat([plain_upsample_argmax(image, size) for image in scores.split(1)])
    return at_full_size(scores, size).argmax(1)


@torch.no_grad()
def confidences(weights: Weights, images: Tensor, layout: SupertokenLayout) -> Tensor:
    """The exit's largest class probability for each token of a trimmed layout, fp32; zero for prefix tokens."""
    ((last, head),) = weights.exits.items()
    tokens, inputs = weights.vit.packed_embedding(images, layout, "area"), weights.vit.block_inputs(layout)
    for number in range(1, last + 1):
        tokens = weights.vit.packed_block(number, tokens, inputs)
    return head.take(tokens, layout, None)[0].confidence


def threshold_for(confidence: Tensor, share: float) -> float:
    """What this share of the tokens exceeds, halfway to the next value so that rounding flips few. Zeros are prefix tokens'."""
    ordered = [1.0, *sorted(filter(None, confidence.tolist()), reverse=True), 0.0]
    count = round(share * (len(ordered) - 2))
    return (ordered[count] + ordered[count + 1]) / 2
