"""What only a GPU does, on one small segmenter: kernels as a whole model, as a replayed CUDA graph, compiled. Of ``python -m step_kernels``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backend import use_backend
from .selfcheck import Outcome, attempt
from .upsample import upsample_argmax

if TYPE_CHECKING:  # the ops stand below the model, which is imported where it is run
    from .model import StepSegmenter

ALLOWED = 1e-3  # share of the pixels: labels may differ where two classes tie to rounding
CLASSES, SIZE = 7, (96, 160)


def run(device: torch.device) -> list[Outcome]:
    """Predictions in float32 with gradients off; ``error`` is the share of pixels labelled otherwise, over images of four token counts."""
    return [attempt(name, functools.partial(_share, check, device)) for name, check in CASES.items()]


def _share(check: Check, device: torch.device) -> tuple[float, float]:
    segmenter, batches = small_segmenter(), pictures()
    found, expected = check(segmenter, batches, device)
    return float((found.cpu() != expected.cpu()).float().mean()), ALLOWED


def small_segmenter() -> StepSegmenter:
    """ViT of three blocks, variance policy, an exit that about half of the tokens take; on the CPU, drawn alike everywhere."""
    from .model import LinearDecoder, LinearExit, StepEncoder, StepSegmenter, VariancePolicy, ViT

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        vit = ViT.preset("tiny", img_size=SIZE, depth=3)
        encoder = StepEncoder(vit, VariancePolicy(0.1), {2: LinearExit(vit.embed_dim, CLASSES, threshold=0.3575)})
        segmenter = StepSegmenter(encoder, LinearDecoder(vit.embed_dim, CLASSES)).eval()
        for parameter in segmenter.parameters():
            if parameter.ndim > 1:  # at their usual small start all classes would nearly tie
                parameter.normal_(std=vit.embed_dim**-0.5)
    return segmenter


def pictures() -> list[Tensor]:
    """Four batches of two images, [2, 3, H, W]: noise, of which the policy merges the flat part, larger from batch to batch."""
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randn(4, 2, 3, *SIZE, generator=generator))
    for number, images in enumerate(batches):
        images[0, :, :, : 32 * (1 + number)] *= 0.01
    return batches


def _predict(segmenter: StepSegmenter, batches: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device, and by the reference on the CPU."""
    with use_backend("reference"):
        expected = [segmenter.predict(images) for images in batches]
    segmenter.to(device)
    return torch.cat([segmenter.predict(images.to(device)) for images in batches]), torch.cat(expected)


def _replays(segmenter: StepSegmenter, batches: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """One recording, replayed on images with other token counts, and exact mode."""
    batches, segmenter = [images.to(device) for images in batches], segmenter.to(device)
    captured = segmenter.capture(batches[0])
    found = torch.cat([captured.predict(images) for images in batches])
    return found, torch.cat([segmenter.predict(images) for images in batches])


def _compiled(segmenter: StepSegmenter, batches: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Exact mode compiled as one graph for all token counts, and not compiled."""
    batches, segmenter = [images.to(device) for images in batches], segmenter.to(device)
    scores = torch.compile(segmenter, fullgraph=True)
    with torch.no_grad():
        found = [upsample_argmax(scores(images), SIZE) for images in batches]
    return torch.cat(found), torch.cat([segmenter.predict(images) for images in batches])


Check = Callable[["StepSegmenter", list[Tensor], torch.device], tuple[Tensor, Tensor]]
CASES: dict[str, Check] = {
    "a segmenter's predict": _predict,
    "capture, replayed with other token counts": _replays,
    "torch.compile of the segmenter": _compiled,
}
