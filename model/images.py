"""Images on a patch grid: checked and padded once, where they enter the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor

__all__ = ["Padded", "check_images", "patch_grid"]


@dataclass(frozen=True, eq=False)
class Padded:
    """Images that fill their patch grid."""

    pixels: Tensor  # [B, C, rows * p, cols * p], zeros at the bottom and right
    size: tuple[int, int]  # (height, width) before padding
    grid: tuple[int, int]  # (rows, cols)

    @classmethod
    def of(cls, images: object, weight: Tensor) -> Padded:
        """For the patch embedding ``weight`` [D, C, p, p]; no copy where nothing is padded. Errors: those of `check_images`."""
        pixels, side = check_images(images, weight), weight.shape[2]
        height, width = pixels.shape[2:]
        grid = patch_grid(height, width, side)
        bottom, right = grid[0] * side - height, grid[1] * side - width
        if bottom or right:
            pixels = F.pad(pixels, (0, right, 0, bottom))
        return cls(pixels, (height, width), grid)

    def crop(self, labels: Tensor) -> Tensor:
        """Labels [B, rows * p, cols * p] -> [B, height, width], contiguous."""
        if labels.shape[1:] == self.size:
            return labels
        # A view would keep the padded labels alive.
        return labels[:, : self.size[0], : self.size[1]].clone(memory_format=torch.contiguous_format)


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
