"""Small models and images for the tests of the model layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import (
    AtmDecoder,
    AtmExit,
    CosineExit,
    LinearDecoder,
    LinearExit,
    MaskTransformerDecoder,
    StepEncoder,
    StepSegmenter,
    VariancePolicy,
    ViT,
)

DIM, CLASSES = 48, 5
THRESHOLDS = {"linear": 0.6, "cosine": 0.35}  # about a third halts at each exit of the small segmenters
HEADS = {"linear": LinearExit, "cosine": CosineExit}
DECODERS = {"linear": LinearDecoder, "mask_transformer": MaskTransformerDecoder}


def small_vit(depth: int = 4, *, dtype: torch.dtype = torch.float32, img_size: int = 64, seed: int = 0) -> ViT:
    """Dim 48, 3 heads, patch 8, on weights large enough that every part of the model matters."""
    torch.manual_seed(seed)
    vit = ViT.preset("tiny", img_size=img_size, embed_dim=DIM, depth=depth, num_heads=3, patch_size=8)
    return enlarge(vit).to(dtype)


class NoMerge(nn.Module):
    """Every patch is a token."""

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int) -> SupertokenLayout:
        grid = images.shape[2] // patch_size, images.shape[3] // patch_size
        return SupertokenLayout.uniform(images.shape[0], grid, num_prefix=num_prefix)


def enlarge(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Redraw every parameter: at timm's 0.02 a wrong block would hide in the residual, and zero biases hide lost ones.

    ``std`` suits dim 48; larger models want about dim ** -0.5.
    """
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim:
            nn.init.normal_(parameter, std=std)
    return module


def photographs(
    batch_size: int, height: int, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Noise with flat regions that differ from image to image, so that a variance policy merges raggedly."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, height, width, generator=generator, dtype=torch.float64)
    for number, image in enumerate(images):
        image[:, : height * (number + 1) // (batch_size + 1)] *= 0.01
        image[:, :, : width // 3] *= 0.01
    return images.to(dtype)


def small_segmenter(
    head: str | None = "linear",
    decoder: str = "linear",
    *,
    dtype: torch.dtype = torch.float32,
    blocks: tuple[int, ...] = (1, 3),
    threshold: float | None = None,
    keep_per_class: int = 0,
    policy: nn.Module | None = None,
    img_size: int = 64,
    depth: int = 4,
) -> StepSegmenter:
    """A segmenter whose exits halt some tokens and leave some."""
    vit = small_vit(depth, img_size=img_size)
    policy = VariancePolicy(0.1) if policy is None else policy
    exits = {}
    if head is not None:
        threshold = THRESHOLDS[head] if threshold is None else threshold
        exits = {block: HEADS[head](DIM, CLASSES, threshold, keep_per_class) for block in blocks}
    segmenter = StepSegmenter(StepEncoder(vit, policy, exits), DECODERS[decoder](DIM, CLASSES))
    for part in (segmenter.encoder.exits, segmenter.decoder):
        enlarge(part)
    for exit_head in segmenter.encoder.exits.values():
        if head == "cosine":
            nn.init.constant_(exit_head.scale, 4.0)
    return segmenter.to(dtype).eval()


def small_atm_segmenter(
    *,
    dtype: torch.dtype = torch.float32,
    blocks: tuple[int, ...] = (1, 3),
    threshold: float = 0.5,
    keep_per_class: int = 1,
    policy: nn.Module | None = None,
) -> StepSegmenter:
    """A segmenter of depth 4 whose ATM exits, if any, halt some tokens and leave some."""
    vit, sizes = small_vit(), {"depth": 2, "num_heads": 3}
    exits = {block: AtmExit(DIM, CLASSES, threshold, keep_per_class, **sizes) for block in blocks}
    encoder = StepEncoder(vit, VariancePolicy(0.1) if policy is None else policy, exits)
    segmenter = StepSegmenter(encoder, AtmDecoder(DIM, CLASSES, **sizes))
    for part in (segmenter.encoder.exits, segmenter.decoder):
        enlarge(part)
    for part in (*segmenter.encoder.exits.values(), segmenter.decoder):
        part.head.class_embed.bias = nn.Parameter(torch.tensor([3.0, 0.0]))  # else one class weighs more than any mask
    return segmenter.to(dtype).eval()


def ragged_tokens() -> tuple[Tensor, SupertokenLayout]:
    """Encoder output of three images of different lengths."""
    encoder = StepEncoder(small_vit(depth=1, dtype=torch.float64), VariancePolicy(0.1))
    with torch.no_grad():
        out = encoder(photographs(3, 64, 72, dtype=torch.float64))
    assert len(set(out.layout.lengths().tolist())) == 3
    return out.tokens, out.layout
