"""DINOv2 of Hugging Face transformers with supertokens and a linear segmentation head; DINOv3 by ``--model``.

`StepEncoder.from_transformers` runs the model's own parts on merged tokens, after checking on one image that it computes what transformers computes
where nothing is merged. Without ``--pretrained`` the weights are random, of a small model, and nothing is downloaded; the linear head is untrained either way.
"""

import argparse

import torch
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from step_kernels.model import LinearDecoder, StepEncoder, StepSegmenter, VariancePolicy

CLASSES = 150
MODELS = {"dinov2": (Dinov2Model, Dinov2Config), "dinov3": (DINOv3ViTModel, DINOv3ViTConfig)}
SMALL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinov2", choices=MODELS)
    parser.add_argument(
        "--size", type=int, default=280, help="height of the image in pixels; its width is 1.5 times that"
    )
    parser.add_argument("--pretrained", help="download weights of this name, such as facebook/dinov2-small")
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(1, 3, options.size, options.size * 3 // 2)
    images[:, :, : options.size // 2] *= 0.1  # a calm upper half

    maker, configured = MODELS[options.model]
    model = maker(configured(**SMALL)) if options.pretrained is None else maker.from_pretrained(options.pretrained)
    encoder = StepEncoder.from_transformers(model.eval())
    policy = VariancePolicy.calibrate(images, reduction=1.8, patch_size=encoder.vit.patch_size)
    segmenter = StepSegmenter(encoder.with_policy(policy), LinearDecoder(encoder.vit.embed_dim, CLASSES)).eval()

    labels, trace = segmenter.predict(images), segmenter.trace(images)
    rows, cols = trace.layout.grid
    dense = rows * cols + encoder.vit.num_prefix
    print(f"{options.model}: labels {list(labels.shape)} from {trace.layout.num_tokens} tokens instead of {dense}")


if __name__ == "__main__":
    main()
