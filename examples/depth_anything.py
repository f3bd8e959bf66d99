"""Depth Anything on merged tokens: the backbone of Hugging Face's model replaced, its neck and head as they are.

Without ``--model`` (a name of the hub, to download) the weights are random and the model small: the depth means nothing then, and differs more from
that of all tokens than a trained model's would.
"""

import argparse

import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from step_kernels.model import StepEncoder, VariancePolicy

STAGES = [1, 2, 3, 4]
SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "out_indices": STAGES,
    "reshape_hidden_states": False,
}


def random_model() -> DepthAnythingForDepthEstimation:
    neck = {
        "neck_hidden_sizes": [24, 48, 96, 96],
        "fusion_hidden_size": 32,
        "reassemble_hidden_size": SMALL["hidden_size"],
    }
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=Dinov2Config(**SMALL), **neck))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="such as depth-anything/Depth-Anything-V2-Small-hf")
    parser.add_argument(
        "--size", type=int, default=280, help="height of the image in pixels; its width is 1.5 times that"
    )
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(1, 3, options.size, options.size * 3 // 2)
    images[:, :, : options.size // 2] *= 0.1  # a calm upper half

    model = random_model() if options.model is None else DepthAnythingForDepthEstimation.from_pretrained(options.model)
    encoder = StepEncoder.from_transformers(model.eval().backbone)
    dense = model(images).predicted_depth
    policy = VariancePolicy.calibrate(images, reduction=1.8, patch_size=encoder.vit.patch_size)
    merged = encoder.with_policy(policy)
    model.backbone = merged.as_transformers()
    depth = model(images).predicted_depth

    layout = merged(images).layout
    apart = ((depth - dense).norm() / dense.norm()).item()
    cells = layout.grid[0] * layout.grid[1] + encoder.vit.num_prefix
    print(
        f"depth {list(depth.shape)} from {layout.num_tokens} tokens instead of {cells}; {apart:.1%} off that of all tokens"
    )


if __name__ == "__main__":
    main()
