"""Images on a patch grid: padding and grid sizes that the dense ViT, the encoder and the policies share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor

__all__ = ["check_images", "pad_to_patches", "patch_grid"]


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(rows, cols) of the patch grid of a ``height`` x ``width`` image after padding to the patch size."""
    return -(-height // patch_size), -(-width // patch_size)


def pad_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Pad [B, C, H, W] with zeros at the bottom and right to multiples of ``patch_size``; no copy when none is needed."""
    rows, cols = patch_grid(images.shape[-2], images.shape[-1], patch_size)
    bottom, right = rows * patch_size - images.shape[-2], cols * patch_size - images.shape[-1]
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def check_images(images: object, weight: Tensor, weight_name: str = "patch_embed.proj.weight") -> Tensor:
    """``images`` if they are a non-empty [B, C, H, W] tensor that the convolution ``weight`` [D, C, p, p] can take.

    Raises:
        TypeError: not a tensor, or not of the weight's dtype (normalise uint8 images and cast them first).
        ValueError: another rank, number of channels or device, or an empty dimension.
    """
    shape = ("B", weight.shape[1], "H", "W")
    tensor = check_tensor("images", images, shape, like=weight, like_name=weight_name)
    if 0 in tensor.shape:
        raise ValueError(f"images: expected at least one image and one pixel, got shape {list(tensor.shape)}")
    return tensor
