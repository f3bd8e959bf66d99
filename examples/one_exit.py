"""One early exit added to a Segmenter, its threshold calibrated so that 40 % of the tokens halt there.

The segmenter without exits is what you have. The exit is a LayerNorm and a linear classifier behind one block: tokens
whose class it predicts with more confidence than the threshold are final and leave, the others go on. All weights
here are random, so the labels mean nothing; mechanics and savings are those of a trained model. An exit is trained
like a decoder: everything but the decisions is differentiable.
"""

import argparse

import torch
from torch import Tensor

from step_kernels.model import LinearDecoder, LinearExit, StepEncoder, StepSegmenter, VariancePolicy, ViT, count_flops

CLASSES = 21


def halted_share(segmenter: StepSegmenter, images: Tensor) -> float:
    """The share of the patch tokens that halts at the only exit."""
    trace = segmenter.trace(images)
    patches = trace.layout.num_tokens - trace.layout.num_prefix * len(images)
    return trace.stages[0].halted.sum().item() / patches


def calibrate(segmenter: StepSegmenter, images: Tensor, share: float) -> None:
    """Bisect the only exit's threshold until ``share`` of the tokens of ``images`` halt."""
    (head,) = segmenter.encoder.exit_heads().values()
    low, high = 0.0, 1.0
    for _ in range(12):
        head.threshold.fill_((low + high) / 2)
        if halted_share(segmenter, images) > share:
            low = head.threshold.item()
        else:
            high = head.threshold.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--preset", default="tiny", help="of the ViT: tiny, small, base or large")
    parser.add_argument("--block", type=int, default=8, help="the exit comes after this block")
    parser.add_argument("--share", type=float, default=0.4, help="of the tokens that halt")
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(2, 3, options.size, options.size)
    images[:, :, : options.size // 2] *= 0.1  # a calm upper half

    vit = ViT.preset(options.preset, img_size=options.size)
    policy = VariancePolicy.calibrate(images, reduction=1.5)
    decoder = LinearDecoder(vit.embed_dim, CLASSES)
    before = StepSegmenter(StepEncoder(vit, policy), decoder).eval()

    head = LinearExit(vit.embed_dim, CLASSES)
    torch.nn.init.normal_(head.head.weight, std=vit.embed_dim**-0.5)  # random, but not equally unsure of everything
    after = StepSegmenter(StepEncoder(vit, policy, exits={options.block: head}), decoder).eval()
    calibrate(after, images, options.share)

    dense = count_flops(before, images.shape).total
    merged = count_flops(before, images.shape, before.trace(images)).total
    exited = count_flops(after, images.shape, after.trace(images)).total
    print(
        f"threshold {head.threshold.item():.3f}: {halted_share(after, images):.0%} halted after block {options.block}"
    )
    print(f"GFLOPs: dense {dense / 1e9:.2f}, merged {merged / 1e9:.2f}, merged with the exit {exited / 1e9:.2f}")
    print(f"labels {list(after.predict(images).shape)}")


if __name__ == "__main__":
    main()
