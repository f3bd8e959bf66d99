"""DINOv3 from timm with supertokens and a linear segmentation head, in three lines.

`StepEncoder.from_timm` runs the model's own parts, rotary positions and registers included, on merged tokens, after
checking on one image that it computes what timm computes where nothing is merged. Needs timm >= 1.0.20, the first
that has DINOv3, and PyTorch's own torchvision beside it (docs/install.md, "timm"). Without ``--pretrained`` the weights are random and nothing is downloaded; the linear head is
untrained either way.
"""

import argparse

import timm
import torch

from step_kernels.model import LinearDecoder, StepEncoder, StepSegmenter, VariancePolicy

CLASSES = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_dinov3")
    parser.add_argument(
        "--size", type=int, default=256, help="height of the image in pixels; its width is 1.5 times that"
    )
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(1, 3, options.size, options.size * 3 // 2)
    images[:, :, : options.size // 2] *= 0.1  # a calm upper half
    policy = VariancePolicy.calibrate(images, reduction=1.8)

    vit = timm.create_model(options.model, pretrained=options.pretrained, num_classes=0).eval()
    encoder = StepEncoder.from_timm(vit, policy)
    segmenter = StepSegmenter(encoder, LinearDecoder(vit.embed_dim, CLASSES)).eval()

    labels = segmenter.predict(images)
    tokens, cells = segmenter.trace(images).layout.num_tokens, (labels.shape[1] // 16) * (labels.shape[2] // 16)
    print(
        f"{options.model}: labels {list(labels.shape)} from {tokens} tokens instead of {cells + vit.num_prefix_tokens}"
    )


if __name__ == "__main__":
    main()
