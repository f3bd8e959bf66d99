"""One case: the photographs, one set of weights, and the decisions that every contender repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_kernels import Halting, SupertokenLayout
from step_kernels.model import LinearDecoder, LinearExit, Policy, QuotaPolicy, StepEncoder, VariancePolicy, ViT

from .images import VIEWS, Photographs, view
from .settings import DTYPES, PATCH_SIZE, Settings

NUM_CLASSES = 150  # as ADE20K, the usual data set of dense prediction


@dataclass(frozen=True)
class Case:
    """What all contenders share.

    Attributes:
        settings: what was asked.
        photographs: the batch before normalisation.
        inputs: the batches that rotate while the clock runs, eight of [batch, 3, size, size]: the photographs, then the
            same mirrored and turned.
        vit, decoder: the one set of weights, in eval mode.
        policy: what merges, or None.
        exits: {block number: head}, thresholds calibrated; empty for none.
    """

    settings: Settings
    photographs: Photographs
    inputs: tuple[Tensor, ...]
    vit: ViT
    decoder: LinearDecoder
    policy: Policy | None
    exits: dict[int, LinearExit]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the patch grid."""
        return self.settings.size // PATCH_SIZE, self.settings.size // PATCH_SIZE

    def calibrated(self) -> dict[str, Any]:
        """The thresholds that were found, JSON-ready."""
        threshold = float(self.policy.threshold) if isinstance(self.policy, VariancePolicy) else None
        return {
            "variance_threshold": threshold,
            "exit_thresholds": [float(head.threshold) for head in self.exits.values()],
        }


@torch.no_grad()
def build_case(settings: Settings, photographs: Photographs) -> Case:
    """Builds the model from `settings.seed`, calibrates the policy on all inputs, then the exits behind it."""
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    torch.manual_seed(settings.seed)
    # Drawn on the CPU in fp32, so that a seed means the same weights on every device and in every dtype.
    vit = ViT.preset(settings.model, img_size=settings.size)
    decoder = LinearDecoder(vit.embed_dim, NUM_CLASSES)
    exits = {block: LinearExit(vit.embed_dim, NUM_CLASSES) for block in settings.exits}
    for module in (vit, decoder, *exits.values()):
        module.to(device=device, dtype=dtype).eval()
    pixels = photographs.tensor().to(device)
    inputs = tuple(view(pixels, number).to(dtype).contiguous() for number in range(VIEWS))
    policy = _policy(settings, torch.cat(inputs).float())
    _calibrate_exits(vit, policy, exits, inputs, settings.halt)
    return Case(settings, photographs, inputs, vit, decoder, policy, exits)


def _policy(settings: Settings, images: Tensor) -> Policy | None:
    if settings.policy == "none":
        return None
    if settings.policy == "quota":
        patches = (settings.size // PATCH_SIZE) ** 2
        # Each merged 2x2 block saves three tokens; a grid with an odd side has fewer blocks than a quarter of its cells.
        wanted = round((patches - patches / settings.tokens) / 3)
        scorer = VariancePolicy(0.0, sides=(2,)).to(images.device)
        return QuotaPolicy(scorer, min(wanted, (settings.size // PATCH_SIZE // 2) ** 2)).to(images.device)
    return VariancePolicy.calibrate(images, reduction=settings.tokens, patch_size=PATCH_SIZE)


class ConfidenceRecorder(LinearExit):
    """A head's parameters in an exit that halts nothing and keeps the confidences of one call: fp32 [tokens]."""

    confidence: Tensor

    def __init__(self, head: LinearExit) -> None:
        super().__init__(head.dim, head.num_classes, threshold=float("inf"))
        self.norm, self.head = head.norm, head.head
        self.to(head.threshold.device)

    def halt(
        self, tokens: Tensor, layout: SupertokenLayout, *, canvas: Tensor, halted: Tensor | None = None
    ) -> Halting:
        halting = super().halt(tokens, layout, canvas=canvas, halted=halted)
        self.confidence = halting.confidence[layout.cells[:, 3] > 0]
        return halting


def _calibrate_exits(
    vit: ViT, policy: Policy | None, exits: Mapping[int, LinearExit], inputs: Sequence[Tensor], share: float
) -> None:
    """Sets the thresholds so that each exit halts the same part of the tokens at the input, all exits together `share`.

    One exit after the other, each on the tokens that the exits before it leave.
    """
    tokens_at_input = 0
    for number, (block, head) in enumerate(exits.items()):
        recorder = ConfidenceRecorder(head)
        before = dict(list(exits.items())[:number])
        encoder = StepEncoder(vit, policy, {**before, block: recorder}).eval()
        confidences = []
        for images in inputs:
            # No further than the exit: the blocks behind it decide nothing.
            encoder.forward_intermediates(images, [block - 1], stop_early=True, intermediates_only=True)
            confidences.append(recorder.confidence)
        confidence = torch.cat(confidences)
        tokens_at_input = tokens_at_input or confidence.numel()
        head.threshold.fill_(threshold_for(confidence, round(share * tokens_at_input / len(exits))))


def threshold_for(confidence: Tensor, count: int) -> float:
    """A threshold that `count` of the values exceed, halfway to the next value so that rounding flips few decisions.

    Args:
        confidence: probabilities, floating point [tokens].
        count: from 0; values above the number of tokens mean all of them.
    """
    ordered = confidence.double().sort(descending=True).values
    if count <= 0:
        return 1.0
    if count >= ordered.numel():
        return 0.0
    return float((ordered[count - 1] + ordered[count]) / 2)
