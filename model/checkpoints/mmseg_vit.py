"""MmsegViT: mmsegmentation's ViT, which differs from timm's in how it resizes position embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...numerics import accumulator
from ..vit import ViT

__all__ = ["MmsegViT"]


class MmsegViT(ViT):
    """`ViT` whose positions are resized by plain bicubic interpolation, without timm's antialiasing.

    PyTorch's two bicubic filters have different coefficients (-0.75 and, with antialiasing, -0.5), so they differ also where
    the grid grows. Applies to the position rule ``"bicubic"``.

    Source: mmsegmentation, ``VisionTransformer.resize_pos_embed``.
    """

    def grid_positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.config.grid or self.config.position_rule != "bicubic":
            return super().grid_positions(grid)
        positions = self.pos_embed[0, self.num_prefix :]
        image = positions.to(accumulator(positions.dtype)).t().reshape(1, -1, *self.config.grid)
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        return image.flatten(2)[0].t().to(positions.dtype)
