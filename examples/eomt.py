"""EoMT with its first blocks on supertokens: the blocks before its queries enter, which are most of them.

Without ``--model`` (a name of the hub, to download) the weights are random and the model small: its masks mean nothing then.
"""

import argparse

import torch
from transformers import EomtConfig, EomtForUniversalSegmentation

from step_kernels.model import StepEncoder, VariancePolicy

SMALL = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "num_blocks": 2, "num_queries": 20}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="such as tue-mps/coco_panoptic_eomt_large_640")
    parser.add_argument("--size", type=int, default=256, help="side of the random model's images in pixels")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.model is None:
        model = EomtForUniversalSegmentation(EomtConfig(**SMALL, image_size=options.size))
        model.attn_mask_probs.zero_()  # as after training: the queries see everything
    else:
        model = EomtForUniversalSegmentation.from_pretrained(options.model)
    size = model.config.image_size
    images = torch.randn(1, 3, size, size)
    images[:, :, : size // 2] *= 0.1  # a calm upper half

    encoder = StepEncoder.from_transformers(model.eval())
    policy = VariancePolicy.calibrate(images, reduction=1.8, patch_size=encoder.vit.patch_size)
    merged = encoder.with_policy(policy)
    masks = merged.as_transformers()(images).masks_queries_logits

    layout = merged(images).layout
    dense = layout.grid[0] * layout.grid[1] + encoder.vit.num_prefix
    same = (
        (encoder.as_transformers()(images).masks_queries_logits - model(images).masks_queries_logits).abs().max().item()
    )
    blocks = f"{encoder.vit.depth} of {model.config.num_hidden_layers} blocks"
    print(f"masks {list(masks.shape)}; {blocks} on {layout.num_tokens} tokens instead of {dense}")
    print(f"largest difference of the masks where nothing merges: {same:.1e}")


if __name__ == "__main__":
    main()
