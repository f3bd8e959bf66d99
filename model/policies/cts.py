"""CTSPolicy: the policy network of Content-aware Token Sharing, which ranks 2x2 blocks of patches.

Source: Lu et al., "Content-aware Token Sharing for Efficient Semantic Segmentation with Vision Transformers" (CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...extras import import_extra
from ..images import check_images
from .base import Policy, grid_of

__all__ = ["CTSPolicy"]

STRIDE = 32  # of EfficientNet-Lite0's last feature map


class CTSPolicy(Policy):
    """EfficientNet-Lite0's last features and a 1x1 convolution to two logits per 32 x 32 pixels: keep the block, or share it.

    Score = softmax of the second logit, in fp32. CTS merges the best blocks of each image, ``QuotaPolicy(CTSPolicy(),
    count)``; by itself this policy merges the blocks that the network would rather share (score above 0.5).

    The parameters' names are CTS's: ``backbone`` (timm's ``efficientnet_lite0``, ``features_only``) and ``head``. They start
    at random; `load_checkpoint` reads them from a CTS-Segmenter checkpoint. The network sees the images after padding to
    the patch size; CTS shows it the images before (no difference where nothing is padded).

    Raises:
        ImportError: timm is missing.
    """

    def __init__(self) -> None:
        super().__init__((2,))
        timm = import_extra("timm", "timm", "timm")
        self.backbone = timm.create_model("efficientnet_lite0", pretrained=False, features_only=True)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[-1], 2, 1)

    def logits(self, images: Tensor, *, patch_size: int) -> Tensor:
        """Logits [B, 2, rows // 2, cols // 2] before the softmax; differentiable. Errors: as `PolicyNet.logits`.

        Args:
            images: [B, 3, rows * 16, cols * 16], normalised, in the parameters' dtype.
            patch_size: 16, as a block of 2x2 patches has the network's stride of 32 pixels then.
        """
        rows, cols = grid_of(images, patch_size)
        if 2 * patch_size != STRIDE:
            raise ValueError(
                f"patch_size: expected {STRIDE // 2}, half of the stride of CTS's network, got {patch_size}"
            )
        check_images(images, self.backbone.conv_stem.weight, "the policy's first convolution")
        logits = self.head(self.backbone(images)[-1])
        return logits[:, :, : rows // 2, : cols // 2]

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        return [self.logits(images, patch_size=patch_size).softmax(1, dtype=torch.float32)[:, 1]]

    def score_thresholds(self, sides: Sequence[int]) -> float:
        return 0.5
