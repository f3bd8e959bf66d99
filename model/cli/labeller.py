"""Pixels to labels, with the tokens and the time that they took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..encoder import StepEncoder
from ..policies.base import VariancePolicy
from ..segmenter import StepSegmenter
from ..windows import Runs, crops_of, predict_windows, run_size

__all__ = ["WHOLE", "Labeller", "time_of_whole"]

WHOLE = {"window": "whole", "resize": "own"}  # views of pictures as they are, whatever the checkpoint tells


@dataclass(eq=False)
class Labeller:
    """A segmenter with what turns pixels into its input."""

    segmenter: StepSegmenter  # on its device, in its dtype
    mean: tuple[float, ...]  # for pixels scaled to 0..1
    std: tuple[float, ...]
    views: dict[str, Any]  # arguments of `predict_windows`

    def labels(self, pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, float]]:
        """uint8 [H, W, 3] -> class numbers [H, W], uint8 up to 256 classes, else int32; tokens after the merge, and seconds."""
        begun, runs = time.perf_counter(), Runs()
        found = predict_windows(self.segmenter, self.image(pixels), **self.views, runs=runs)[0].cpu().numpy()
        return found, (sum(trace.layout.num_tokens for _, trace in runs), time.perf_counter() - begun)

    @property
    def windowed(self) -> bool:
        """Whether pictures are run in crops."""
        return (self.views.get("window") or self.segmenter.info.window or "whole") != "whole"

    def size(self, pixels: np.ndarray) -> tuple[int, int]:
        """Height and width that a picture is run at."""
        return run_size(self.segmenter, pixels.shape[:2], self.views.get("resize"))

    def image(self, pixels: np.ndarray) -> Tensor:
        """The model's input [1, 3, H, W]."""
        weight = self.segmenter.encoder.vit.embedding.weight
        image = torch.tensor(pixels, device=weight.device).permute(2, 0, 1)[None].float() / 255
        mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((image - mean) / std).to(weight.dtype)

    def crops(self, pixels: np.ndarray) -> Iterator[Tensor]:
        """What the model is run on, one crop [3, H, W] at a time."""
        view: list[Any] = [self.views.get(name) for name in ("window", "stride", "resize")]
        yield from crops_of(self.segmenter, self.image(pixels), *view)[2]

    def reduce(self, pictures: Iterator[np.ndarray], reduction: float) -> None:
        """Merge by a variance policy that leaves ``reduction`` times fewer tokens of these pictures."""
        crops = (crop for pixels in pictures for crop in self.crops(pixels))
        patch_size = self.segmenter.encoder.vit.patch_size
        policy = VariancePolicy.calibrate(crops, reduction=reduction, patch_size=patch_size)
        self.segmenter = self.segmenter.with_policy(policy)

    def dense(self) -> Labeller:
        """The same model, which neither merges nor exits."""
        segmenter = StepSegmenter(StepEncoder(self.segmenter.encoder.vit), self.segmenter.decoder).eval()
        segmenter.info = self.segmenter.info
        return replace(self, segmenter=segmenter)


def time_of_whole(labeller: Labeller, pixels: np.ndarray, window: tuple[int, int]) -> tuple[float, float]:
    """Seconds that a picture takes at once, and in windows: estimated from one window's, measured here."""
    height, width = pixels.shape[:2]
    run_height, run_width = labeller.size(pixels)
    top, left = (height - min(height, window[0])) // 2, (width - min(width, window[1])) // 2
    crop = pixels[top : top + window[0], left : left + window[1]]
    whole_crop = replace(labeller, views=WHOLE)
    whole_crop.labels(crop)  # warms up
    _, (tokens, seconds) = whole_crop.labels(crop)
    dim, whole = labeller.segmenter.encoder.vit.embed_dim, tokens * run_height * run_width / crop[..., 0].size
    # A block's multiplications: 12 dim**2 for each token in linear layers, 2 dim for each pair of tokens in attention.
    ratio = whole * (12 * dim + 2 * whole) / (tokens * (12 * dim + 2 * tokens))
    crops = math.ceil(run_height / window[0]) * math.ceil(run_width / window[1])
    return seconds * ratio, seconds * crops
