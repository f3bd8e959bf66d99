"""What the contenders of one comparison share: weights, rotating inputs, recorded decisions."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import (
    LinearDecoder,
    LinearExit,
    Policy,
    PolicyNet,
    StepEncoder,
    StepSegmenter,
    Trace,
    ViT,
)
from step_kernels.model.vit import PRESETS

from ..compiling import CompileBudget
from ..settings import DTYPES, PATCH_SIZE
from .layouts import SPREAD, draw_traces, without_exits, without_merging
from .roofline import FRONT as FRONT_PARTS
from .roofline import Work, mean_work, work_of
from .settings import Settings

DENSE, MERGED, MERGED_EXITS, FRONT = "dense", "merged", "merged + exits", "policy + layout + merge"
EXITS = "exits"  # nothing is merged, and the patches of a supertoken that halts in the traces halt


@dataclass(frozen=True)
class Weights:
    """One model for images of one size, in eval mode; the policy is a `PolicyNet` as deployed, with random weights: asked, not obeyed.

    Attributes:
        name: preset of the ViT.
        kept: what contenders keep for the next comparison of this model at this size, such as compiled code, by names of their own.
    """

    name: str
    vit: ViT
    decoder: LinearDecoder
    policy: Policy
    exits: dict[int, LinearExit]
    kept: dict[tuple[str, int], Any] = field(default_factory=dict)


@torch.no_grad()
def draw_weights(settings: Settings, name: str, size: int | None = None) -> Weights:
    """Weights from `settings.seed`, the same numbers on every device and in every dtype; one exit at 2/3 of the depth.

    Args:
        settings: of the run.
        name: preset of the ViT.
        size: of the images; None for the first one of the settings.
    """
    torch.manual_seed(settings.seed)
    vit = ViT.preset(name, img_size=size or settings.sizes[0])
    decoder = LinearDecoder(vit.embed_dim, settings.classes)
    policy = PolicyNet()
    exits = {PRESETS[name]["depth"] * 2 // 3: LinearExit(vit.embed_dim, settings.classes)}
    for module in (vit, decoder, *exits.values()):
        _fill_vectors(module)
    for part in (vit, decoder, policy, *exits.values()):
        part.to(device=torch.device(settings.device), dtype=DTYPES[settings.dtype]).eval()
    return Weights(name, vit, decoder, policy.deployed(), exits)


def _fill_vectors(module: nn.Module) -> None:
    """Off their initial zeros and ones, with which a contender that forgets a bias or a norm's weight would pass."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.02 * torch.randn(parameter.shape))


@dataclass
class Case:
    """One comparison: a model, a batch size, a kind of layouts.

    Attributes:
        settings: of the run.
        weights: of the model.
        inputs: batches that rotate while the clock runs, [batch, 3, size, size] each: random, no two images alike.
        kind: of layouts.
        traces: the recorded decisions, trimmed, one for each input.
        compiling: the budget of torch.compile.
    """

    settings: Settings
    weights: Weights
    inputs: tuple[Tensor, ...]
    kind: str
    traces: tuple[Trace, ...]
    compiling: CompileBudget
    _work: dict[str, tuple[Work, ...]] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def size(self) -> int:
        return self.inputs[0].shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patch grid."""
        return self.size // PATCH_SIZE, self.size // PATCH_SIZE

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def static(self) -> bool:
        """Whether CUDA graphs are to be had."""
        return self.device.type == "cuda"

    @functools.cached_property
    def uniform(self) -> SupertokenLayout:
        """Every patch a token."""
        return SupertokenLayout.uniform(
            self.batch, self.grid, num_prefix=self.weights.vit.num_prefix, device=self.device
        )

    def decisions(self, family: str) -> tuple[Trace, ...]:
        """What contenders of a family repeat, one for each input."""
        if family == DENSE:
            return tuple(Trace(self.uniform) for _ in self.inputs)
        if family == MERGED_EXITS:
            return self.traces
        if family == EXITS:
            return tuple(map(without_merging, self.traces))
        return tuple(map(without_exits, self.traces))

    def model(self, family: str) -> StepSegmenter:
        """What contenders of a family must compute, for the oracle and the FLOP count."""
        policy, exits = self.decided_by(family)
        return StepSegmenter(StepEncoder(self.weights.vit, policy, exits), self.weights.decoder).eval()

    def decided_by(self, family: str) -> tuple[Policy | None, dict[int, LinearExit]]:
        """Policy and exits of a family, by which the model decides when it runs free."""
        policy = None if family in (DENSE, EXITS) else self.weights.policy
        return policy, self.weights.exits if family in (MERGED_EXITS, EXITS) else {}

    def work(self, family: str) -> tuple[Work, ...]:
        """What a call of a family has to do, mean over the inputs."""
        if family not in self._work:
            model, pairs = self.model(family), list(zip(self.inputs, self.decisions(family), strict=True))
            calls = [work_of(model, images, trace) for images, trace in (pairs[:1] if family == DENSE else pairs)]
            if family == FRONT:
                calls = [tuple(part for part in parts if part.part in FRONT_PARTS) for parts in calls]
            self._work[family] = mean_work(calls)
        return self._work[family]

    def gigaflops(self, family: str) -> float:
        """Per image, mean over the inputs: matmuls and convolutions, attention's two matmuls counted, without the tail."""
        return sum(part.flops for part in self.work(family)) / self.batch / 1e9


def draw_inputs(settings: Settings, batch: int, size: int | None = None) -> tuple[Tensor, ...]:
    """Random images, never zeros: a GPU multiplies zeros faster; of the first size of the settings where `size` is None."""
    device = torch.device(settings.device)
    generator = torch.Generator(device).manual_seed(settings.seed)
    side = size or settings.sizes[0]
    shape = (batch, 3, side, side)
    drawn = (torch.randn(shape, generator=generator, device=device) for _ in range(settings.inputs))
    return tuple(images.to(DTYPES[settings.dtype]) for images in drawn)


def draw_case(
    settings: Settings, weights: Weights, inputs: tuple[Tensor, ...], kind: str, compiling: CompileBudget
) -> Case:
    """The case of one kind of layouts; the other parts may be shared between kinds."""
    (block,) = weights.exits
    cells = inputs[0].shape[-1] // PATCH_SIZE
    traces = draw_traces(
        kind,
        len(inputs),
        inputs[0].shape[0],
        (cells, cells),
        block=block,
        seed=settings.seed,
        device=inputs[0].device,
    )
    return Case(settings, weights, inputs, kind, traces, compiling)


def is_spread(case: Case) -> bool:
    """The kind that the bars are about."""
    return case.kind == SPREAD
