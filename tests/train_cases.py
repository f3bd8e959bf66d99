"""Small models and scenes for the tests of training."""

from __future__ import annotations

import torch

from step_kernels.model import (
    CheckpointInfo,
    LinearDecoder,
    LinearExit,
    PolicyNet,
    StepEncoder,
    StepSegmenter,
    ViT,
    ViTConfig,
)
from step_kernels.model.train import Recipe, Scenes, TrainSettings

SIZE, PATCH, CLASSES = 64, 8, len(Scenes.classes)
INFO = CheckpointInfo("scenes", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), classes=Scenes.classes)
AS_THEY_ARE = Recipe(scale=(1.0, 1.0), flip=0.0, colour=False)


def small_segmenter(policy: object = "net", exits: tuple[int, ...] = (1,), *, seed: int = 0, **named) -> StepSegmenter:
    torch.manual_seed(seed)
    vit = ViT(ViTConfig(24, 2, 2, img_size=SIZE, patch_size=PATCH))
    made = PolicyNet((2, 4), 0.5, width=4) if policy == "net" else policy
    heads = {number: LinearExit(24, CLASSES, **named) for number in exits}
    segmenter = StepSegmenter(StepEncoder(vit, made, heads), LinearDecoder(24, CLASSES))
    for name, parameter in segmenter.named_parameters():  # as timm draws them, nothing depends on anything
        if "policy" not in name and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return segmenter


def items(count: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised images, labels)"""
    scenes = [Scenes(count, SIZE, seed)[i] for i in range(count)]
    pictures, labels = (torch.stack(column) for column in zip(*scenes, strict=True))
    return (pictures.float() / 255 - 0.5) / 0.25, labels.long()


def settings(stage: str, **named) -> TrainSettings:
    return TrainSettings(stage, **{"epochs": 2, "batch": 2, "recipe": AS_THEY_ARE, **named})
