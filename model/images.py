"""Images on a patch grid: checked and padded once, where they enter the model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor

__all__ = ["check_images", "pad_images", "patch_grid"]


def pad_images(images: object, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """``images`` for the patch embedding ``weight`` [D, C, p, p], with zeros at the bottom and right, and their grid (rows, cols).

    No copy where nothing is padded. Errors: those of `check_images`.
    """
    pixels, side = check_images(images, weight), weight.shape[2]
    height, width = pixels.shape[2:]
    rows, cols = patch_grid(height, width, side)
    bottom, right = rows * side - height, cols * side - width
    return F.pad(pixels, (0, right, 0, bottom)) if bottom or right else pixels, (rows, cols)


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(rows, cols) of the patch grid of a ``height`` x ``width`` image after padding to the patch size."""
    return -(-height // patch_size), -(-width // patch_size)


def check_images(images: object, weight: Tensor, weight_name: str = "patch_embed.proj.weight") -> Tensor:
    """``images`` if they are a non-empty [B, C, H, W] tensor that the convolution ``weight`` [D, C, p, p] can take."""
    shape = ("B", weight.shape[1], "H", "W")
    tensor = check_tensor("images", images, shape, like=weight, like_name=weight_name)
    if 0 in tensor.shape:
        raise ValueError(f"images: expected at least one image and one pixel, got shape {list(tensor.shape)}")
    return tensor
