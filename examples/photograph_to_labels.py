"""A photograph to labels, dense and on merged tokens: how many labels agree, and how long either way takes.

Without ``--checkpoint`` (any file that `load_checkpoint` reads) the weights are random: labels mean nothing then, and agree less than those of
a trained model would; tokens and times are what they are. Needs Pillow, and scikit-image for the default photograph.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from step_kernels.model import LinearDecoder, StepEncoder, StepSegmenter, VariancePolicy, ViT, load_segmenter

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture_of(file: Path | None, height: int) -> Image.Image:
    if file is None:
        from skimage.data import astronaut

        picture = Image.fromarray(astronaut())
    else:
        picture = Image.open(file).convert("RGB")
    return picture.resize((round(height * picture.width / picture.height), height))


def normalised(picture: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def milliseconds(segmenters: list[StepSegmenter], images: Tensor, times: int) -> list[float]:
    """Medians; the segmenters take turns, after one run each that does not count."""
    taken: list[list[float]] = [[] for _ in segmenters]
    for _ in range(times + 1):
        for segmenter, own in zip(segmenters, taken, strict=True):
            begun = time.perf_counter()
            segmenter.predict(images).cpu()  # waits for a GPU
            own.append(1e3 * (time.perf_counter() - begun))
    return [statistics.median(own[1:]) for own in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="a photograph of your own")
    parser.add_argument("--checkpoint", type=Path, help="a trained segmenter")
    parser.add_argument("--height", type=int, default=512, help="in pixels, that the picture is resized to")
    parser.add_argument("--reduction", type=float, default=2.5, help="how many times fewer tokens")
    parser.add_argument("--preset", default="small", help="of the random ViT: tiny, small, base or large")
    parser.add_argument("--times", type=int, default=5, help="timed runs")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.checkpoint is None:
        vit = ViT.preset(options.preset, img_size=options.height)
        dense = StepSegmenter(StepEncoder(vit), LinearDecoder(vit.embed_dim, 21)).eval()
    else:
        dense = load_segmenter(options.checkpoint).with_policy(None)
    mean, std = dense.info.mean or IMAGENET[0], dense.info.std or IMAGENET[1]
    images = normalised(picture_of(options.picture, options.height), mean, std)

    patch_size = dense.encoder.vit.patch_size
    policy = VariancePolicy.calibrate(images, reduction=options.reduction, patch_size=patch_size)
    merged = dense.with_policy(policy)  # the same weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense, merged, images = dense.to(device), merged.to(device), images.to(device)
    agreeing = (dense.predict(images) == merged.predict(images)).float().mean().item()
    tokens = [segmenter.trace(images).token_counts()[0] for segmenter in (dense, merged)]
    times = milliseconds([dense, merged], images, options.times)
    print(f"labels {list(images.shape[2:])}, {policy}")
    print(f"dense:  {tokens[0]} tokens, {times[0]:.1f} ms")
    print(f"merged: {tokens[1]} tokens, {times[1]:.1f} ms: {times[0] / times[1]:.2f}x")
    print(f"{agreeing:.1%} of the labels agree")


if __name__ == "__main__":
    main()
