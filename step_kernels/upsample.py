"""The output tail: class scores on the patch grid to labels at image size."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_grid, check_tensor
from .library import define


def upsample_argmax(canvas: Tensor, size: tuple[int, int]) -> Tensor:
    """The most probable class of each pixel, without ever storing full-size logits. No gradient.

    Equivalent PyTorch: ``F.interpolate(canvas, size, mode="bilinear", align_corners=False).argmax(1)``; interpolation is computed in
    fp32 (fp64 for an fp64 canvas), so a label can differ where the two best classes tie within rounding. A source of weight zero takes no
    part, even infinite or NaN (PyTorch's 0 * inf is NaN, which would label border pixels with classes of log-probability -inf).

    Args:
        canvas: [B, C, rows, cols], floating point, any strides.
        size: (height, width), any ratio to (rows, cols), also smaller.

    Returns:
        [B, height, width], uint8 while C <= 256, else int32.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape; no class.
    """
    check_tensor("canvas", canvas, ("B", "C", "rows", "cols"))
    if 0 in canvas.shape[1:]:
        raise ValueError(f"canvas: expected at least one class and one cell, got {list(canvas.shape)}")
    height, width = check_grid("size", size)
    return _upsample_argmax(canvas.detach(), height, width)


_upsample_argmax = define(
    "upsample_argmax(Tensor canvas, SymInt height, SymInt width) -> Tensor",
    module="upsample",
    fake=lambda canvas, height, width: canvas.new_empty(
        canvas.shape[0], height, width, dtype=torch.uint8 if canvas.shape[1] <= 256 else torch.int32
    ),
)
