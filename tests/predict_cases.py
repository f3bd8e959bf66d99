"""Pictures, a small checkpoint and the command itself, for the tests of `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import photographs, small_segmenter

from step_kernels.model import CheckpointInfo, save_checkpoint
from step_kernels_cli import main

Image = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra predict")
pytest.importorskip("safetensors", reason="safetensors comes with the extra predict")
pytest.importorskip("tqdm", reason="tqdm comes with the extra predict")

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def save_picture(path: Path, height: int, width: int, seed: int = 0, **options: Any) -> np.ndarray:
    """Noise with flat regions; the pixels."""
    noise = photographs(1, height, width, seed=seed)[0]
    pixels = (noise * 50 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, **options)
    return pixels


def read(path: Path) -> tuple[str, np.ndarray]:
    with Image.open(path) as image:
        return image.mode, np.asarray(image).copy()


def model_input(pixels: np.ndarray, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> torch.Tensor:
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    return (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def save_small(folder: Path) -> Path:
    """A checkpoint of 5 classes that tells `MEAN` and `STD`."""
    return save_checkpoint(small_segmenter(), folder, info=CheckpointInfo("any", mean=MEAN, std=STD))


def run(checkpoint: Path, folder: Path, *names: str, options: tuple[str, ...] = ()) -> int:
    pictures = [str(folder / "in" / name) for name in names]
    return main(["predict", str(checkpoint), *pictures, "--out", str(folder / "out"), "--device", "cpu", *options])
