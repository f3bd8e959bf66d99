"""timm's rotary positions as those of packed tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..foreign.parts import class_name, refused
from ..foreign.rope import Axes, axial_turns, centred_turns

__all__ = ["check_rope", "turns_per_cell"]


def check_rope(model: Any) -> None:
    """Refuse rotations that are no constant multiple of the position, or that start at another token than the first patch."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return
    name = class_name(rope)
    if name == "RotaryEmbeddingCat" and (rope.in_pixels or getattr(rope, "grid_type", "index") != "index"):
        raise refused("vit.rope", name, "expected positions counted in patches")
    for number, block in enumerate(model.blocks):
        if block.attn.num_prefix_tokens != model.num_prefix_tokens:
            path = f"vit.blocks.{number}.attn"
            raise refused(path, class_name(block.attn), f"expected {model.num_prefix_tokens} tokens without rotation")


def turns_per_cell(rope: Any, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """timm's rotary positions as ``frequencies`` [P, 2] and ``phases`` [P] for `rope_table`, computed on the device.

    For a layout that merges nothing that table is ``rope.get_embed(grid)``; for one of equal blocks, DINOv3's is that of the
    coarse grid, since positions there are shares of the image. Coordinates that timm shifts or scales at random are refused.
    """
    augmentations = ("shift_coords", "jitter_coords", "rescale_coords")
    augmented = getattr(rope, "aug_active", False) or any(
        getattr(rope, name, None) is not None for name in augmentations
    )
    if rope.training and augmented:
        raise refused("vit.rope", class_name(rope), "its coordinates are shifted or scaled at random in training")
    periods = getattr(rope, "periods", None)
    if periods is None:
        axes = counted_turns(rope, grid, device, dtype)
    else:
        shared = {"max": max(grid), "min": min(grid)}.get(rope.normalize_coords)
        sizes = grid if shared is None else (shared, shared)
        axes = centred_turns(periods.to(device, dtype), sizes, getattr(rope, "grid_offset", 0.0))
    return axial_turns(axes, (1, 0) if rope.grid_indexing == "xy" else (0, 1))  # timm's pairs for columns come first


def counted_turns(rope: Any, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Axes:
    """EVA-02: coordinates are cell numbers, rescaled to the grid of pretraining where the model says so."""
    count = rope.dim // 4
    exponents = torch.arange(count, device=device, dtype=torch.float32) / count
    bands = (1.0 / rope.temperature**exponents).to(dtype) / (2 * math.pi)  # fp32 powers, as timm's
    reference = rope.ref_feat_shape or grid
    per_cell = [bands * (own / size) for own, size in zip(reference, grid, strict=True)]
    return per_cell, [turns * rope.grid_offset for turns in per_cell]
