"""Inputs of merge_patches, embed_patches and merge_tokens, and the calls that the tests of their floors hold to the error rule."""

from __future__ import annotations

from typing import Any

import torch
from layouts import AWKWARD, PlainLayout
from torch import Tensor

import step_kernels as sk

NAMES = [name for name in AWKWARD if name != "empty_batch"]
RESAMPLES = ["area", "bilinear"]
MEAN, STD = torch.tensor([0.48, 0.46, 0.41, 0.5]), torch.tensor([0.23, 0.22, 0.27, 0.3])
TINY = PlainLayout((((0, 0, 2), (0, 2, 1), (1, 3, 1)), ((0, 1, 1), (0, 2, 2))), (2, 5), 1)
# One block of every side up to 64, the rest of the grid halted.
EVERY_SIDE = PlainLayout(
    (((0, 0, 64), (0, 64, 32), (0, 96, 16), (0, 112, 8), (0, 120, 4), (0, 124, 2), (0, 126, 1), (16, 112, 16)),),
    (64, 128),
)
Layout = PlainLayout | sk.SupertokenLayout


def images_for(layout: Layout, patch_size: int = 2, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    rows, columns = layout.grid
    shape = layout.batch_size, channels, rows * patch_size, columns * patch_size
    return torch.randint(0, 256, shape).byte() if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def embedding(
    layout: Layout, dtype: torch.dtype = torch.float32, patch_size: int = 2, width: int = 5
) -> dict[str, Tensor]:
    """Every parameter of embed_patches for images of three channels."""
    shapes = {
        "weight": (width, 3, patch_size, patch_size),
        "bias": (width,),
        "pos_embed": (layout.grid[0] * layout.grid[1], width),
        "prefix": (layout.num_prefix, width),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def merged(
    images: Tensor, layout: sk.SupertokenLayout, patch_size: int, cotangent: Tensor | None, options: dict[str, Any]
) -> list[Tensor]:
    """Patches and, with a cotangent, the gradient of the images."""
    images = images.detach().requires_grad_(cotangent is not None)
    out = sk.merge_patches(images, layout, patch_size, **options)
    return [out] if cotangent is None else [out.detach(), *torch.autograd.grad(out, images, cotangent)]


def embedded(
    tensors: dict[str, Tensor], layout: sk.SupertokenLayout, cotangent: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """Tokens, and the gradients of every argument but bytes."""
    tensors = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    out = sk.embed_patches(layout=layout, **tensors, **options)
    inputs = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def pooled(tokens: Tensor, prefix: Tensor | None, layout: sk.SupertokenLayout, cotangent: Tensor) -> tuple[Tensor, ...]:
    """merge_tokens, and the gradients of what is given."""
    leaves = [x.detach().requires_grad_() for x in (tokens, prefix) if x is not None]
    out = sk.merge_tokens(leaves[0], layout, prefix=None if prefix is None else leaves[1])
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)
