"""timm's rotary position embeddings as turns per cell: what `rope_table` makes a table of, for merged tokens too.

Equivalent PyTorch: for a layout that merges nothing the table is ``rope.get_embed(grid)``; for one of equal blocks, DINOv3's is that of the
coarse grid, since positions there are shares of the image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .parts import class_name, refused

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
    """``frequencies`` [P, 2] and ``phases`` [P] for `rope_table`, computed on the device.

    Raises:
        NotImplementedError: coordinates that timm shifts or scales at random, in training.
    """
    augmented = getattr(rope, "aug_active", False) or any(
        getattr(rope, name, None) is not None for name in ("shift_coords", "jitter_coords", "rescale_coords")
    )
    if rope.training and augmented:
        raise refused("vit.rope", class_name(rope), "its coordinates are shifted or scaled at random in training")
    if class_name(rope) == "RotaryEmbeddingDinoV3":
        per_cell, at_zero = centred_turns(rope, grid, device, dtype)
    else:
        per_cell, at_zero = counted_turns(rope, grid, device, dtype)
    none = torch.zeros_like(per_cell[0])
    down, right = torch.stack((per_cell[0], none), 1), torch.stack((none, per_cell[1]), 1)
    axes = [(down, at_zero[0]), (right, at_zero[1])]
    if rope.grid_indexing == "xy":  # timm's pairs for columns come first
        axes.reverse()
    return torch.cat([frequencies for frequencies, _ in axes]), torch.cat([phases for _, phases in axes])


Axes = tuple[list[Tensor], list[Tensor]]  # turns per cell and turns at cell 0, each for rows and for columns


def centred_turns(rope: Any, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Axes:
    """DINOv3: coordinates are cell centres mapped to [-1, 1]."""
    periods = rope.periods.to(device, dtype)
    shared = {"max": max(grid), "min": min(grid)}.get(rope.normalize_coords)
    sizes = grid if shared is None else (shared, shared)
    per_cell = [2 / (size * periods) for size in sizes]
    at_zero = [((1 + 2 * getattr(rope, "grid_offset", 0.0)) / size - 1) / periods for size in sizes]
    return per_cell, at_zero


def counted_turns(rope: Any, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Axes:
    """EVA-02: coordinates are cell numbers, rescaled to the grid of pretraining where the model says so."""
    count = rope.dim // 4
    exponents = torch.arange(count, device=device, dtype=torch.float32) / count
    bands = (1.0 / rope.temperature**exponents).to(dtype) / (2 * math.pi)  # fp32 powers, as timm's
    reference = rope.ref_feat_shape or grid
    per_cell = [bands * (own / size) for own, size in zip(reference, grid, strict=True)]
    return per_cell, [turns * rope.grid_offset for turns in per_cell]
