"""The sizes that kernels are tuned for: a model's, on merged images.

``REDUCTION`` times fewer tokens than patches on average, as STEP's policy leaves (arXiv 2509.14165), and not equally many in each image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..extras import import_extra
from ..layout import SupertokenLayout

REDUCTION, SPREAD = 2.5, 0.3  # and the standard deviation of an image's share
MERGED = 0.4, 0.5  # of the 4 x 4 cells, and of the 2 x 2 in the others: on average as many tokens


@dataclass(frozen=True)
class Sizes:
    """Of a model's blocks on one batch."""

    dim: int
    num_heads: int
    hidden: int  # of the MLP
    grid: int  # patches along an edge of an image
    batch: int
    device: torch.device
    dtype: torch.dtype
    patch: int = 16
    classes: int = 150

    @property
    def cells(self) -> int:
        return self.grid**2

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        places = torch.linspace(-1, 1, self.batch) if self.batch > 1 else torch.zeros(1)
        shares = 1 + SPREAD * 3**0.5 * places
        return [max(1, round(float(share) * self.cells / REDUCTION)) for share in shares]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    @functools.cached_property
    def layout(self) -> SupertokenLayout:
        """Blocks of sides 1, 2 and 4 at random, and a prefix token."""
        sides = torch.ones(self.batch, self.grid, self.grid, dtype=torch.int32)
        generator = torch.Generator().manual_seed(0)
        for side, share in ((2, MERGED[1]), (4, MERGED[0])):
            edge = self.grid // side * side
            blocks = torch.rand(self.batch, edge // side, edge // side, generator=generator) < share
            cells = blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)
            sides[:, :edge, :edge].masked_fill_(cells, side)
        return SupertokenLayout.from_sides(sides.to(self.device), num_prefix=1).trim()

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


def sizes_of(
    model: str, size: int, batch: int, device: torch.device, dtype: torch.dtype, classes: int = Sizes.classes
) -> Sizes:
    """Of a preset or a timm model on ``batch`` images of ``size`` x ``size`` pixels, with exits and a decoder of ``classes``.

    Raises:
        ImportError: neither a preset, nor is timm installed.
        ValueError: timm has no such model, or it is no ViT; the image is smaller than a patch.
    """
    from ..model.vit import PRESETS

    if model in PRESETS:
        dim, heads, hidden, patch = PRESETS[model]["embed_dim"], PRESETS[model]["num_heads"], None, 16
    else:
        dim, heads, hidden, patch = _of_timm(model)
    if size < patch:
        raise ValueError(f"size: expected at least one patch of {patch} pixels, got {size}")
    return Sizes(dim, heads, hidden or 4 * dim, size // patch, batch, device, dtype, patch, classes)


def _of_timm(name: str) -> tuple[int, int, int, int]:
    timm: Any = import_extra("timm", "timm", "timm")
    if not timm.is_model(name):
        raise ValueError(f"model: expected one of tiny, small, base, large or a model of timm, got {name!r}")
    try:
        with torch.device("meta"):
            vit = timm.create_model(name)
        block, patch = vit.blocks[0], vit.patch_embed.proj.kernel_size[0]
        return vit.embed_dim, block.attn.num_heads, block.mlp.fc2.in_features, patch
    except Exception as error:
        raise ValueError(f"model: expected a ViT, and timm's {name} is none: {error}") from error
