"""A plain vision transformer with timm's parameter names: the dense model that STEP makes cheaper.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), in timm's pre-norm form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_grid, check_int, check_number, check_tensor, describe
from ..reference.blocks import accumulator
from .images import check_images, pad_to_patches, patch_grid
from .packed import PackedViT

__all__ = ["PRESETS", "Attention", "Block", "Mlp", "PatchEmbed", "ViT", "ViTConfig", "resize_positions"]

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

POSITION_RULES = ("bicubic", "bilinear")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT.

    ``img_size`` is (height, width) in pixels, or one number for both, and only fixes the number of stored position
    embeddings: images of any size run, with the positions resized by ``position_rule`` (see `resize_positions`).

    Raises:
        TypeError: a size is not an int, or a ratio no number.
        ValueError: a size is not positive, ``embed_dim`` is no multiple of ``num_heads``, or the rule is unknown.
    """

    embed_dim: int
    depth: int
    num_heads: int
    img_size: int | tuple[int, int] = 512
    patch_size: int = 16
    in_chans: int = 3
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    position_rule: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "patch_size", "in_chans"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=1))
        for name in ("mlp_ratio", "eps"):
            number = check_number(name, getattr(self, name))
            if not 0 < number < math.inf:
                raise ValueError(f"{name}: expected a positive, finite number, got {number}")
        if self.embed_dim * self.mlp_ratio < 1:
            raise ValueError(
                f"mlp_ratio: expected at least one hidden channel, 1 / {self.embed_dim}, got {self.mlp_ratio}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={self.num_heads}, got {self.embed_dim}")
        check_grid("img_size", self.image_shape)
        check_choice("position_rule", self.position_rule, POSITION_RULES)

    @property
    def image_shape(self) -> tuple[int, int]:
        """``img_size`` as (height, width)."""
        return self.img_size if isinstance(self.img_size, (tuple, list)) else (self.img_size, self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the stored position embeddings."""
        height, width = self.image_shape
        return patch_grid(height, width, self.patch_size)


def resize_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], rule: str) -> Tensor:
    """Resize the grid part of a position embedding to another patch grid.

    Args:
        positions: [old_rows * old_cols, D], floating point, without prefix slots, in raster order.
        old_grid: (rows, cols) that ``positions`` was stored for.
        new_grid: (rows, cols) wanted.
        rule: ``"bicubic"`` is timm's rule (bicubic with antialiasing, in fp32 or wider); ``"bilinear"`` is
            Segmenter's (plain bilinear).

    Returns:
        [new_rows * new_cols, D] in the same dtype; ``positions`` itself when the grids are equal. Differentiable.

    Raises:
        TypeError, ValueError: a shape that does not fit ``old_grid``, an empty grid, an unknown rule.
    """
    check_choice("rule", rule, POSITION_RULES)
    old_grid, new_grid = check_grid("old_grid", old_grid), check_grid("new_grid", new_grid)
    check_tensor("positions", positions, (old_grid[0] * old_grid[1], "D"))
    if old_grid == new_grid:
        return positions
    image = positions.to(accumulator(positions.dtype)).t().reshape(1, -1, *old_grid)
    image = F.interpolate(image, size=new_grid, mode=rule, align_corners=False, antialias=rule == "bicubic")
    return image.flatten(2)[0].t().to(positions.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, C, H, W] -> [B, rows * cols, D]; H and W multiples of the patch size."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one qkv projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on dense [B, L, D]; `packed_block` runs the same parameters on packed tokens."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def flops(self, lengths: Sequence[int]) -> int:
        """FLOPs on sequences of these lengths (prefix tokens included): the four linears and attention's two matmuls."""
        linears = (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        per_token = 2 * sum(linear.weight.numel() for linear in linears)
        attention = 4 * self.attn.proj.in_features * sum(length * length for length in lengths)
        return per_token * sum(lengths) + attention


def init_weights(module: nn.Module) -> None:
    """timm's initialisation of linear layers (truncated normal, zero bias); for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ViT(PackedViT):
    """Dense vision transformer: ``vit(images)`` -> [B, 1 + rows * cols, D] after the final norm.

    One CLS token; position embeddings for it and for every cell of ``config.grid``. Parameter names are timm's.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), in timm's pre-norm form.

    Args:
        config: the sizes; `ViT.preset` has the standard ones.

    Raises:
        TypeError: ``config`` is no `ViTConfig`.
    """

    num_prefix = 1

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if not isinstance(config, ViTConfig):
            raise TypeError(f"config: expected a ViTConfig, got {describe(config)}")
        self.config = config
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix + config.grid[0] * config.grid[1], dim))
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, mlp_ratio=config.mlp_ratio, eps=config.eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=config.eps)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    @classmethod
    def preset(cls, name: str, img_size: int | tuple[int, int] = 512, **overrides: Any) -> ViT:
        """One of the standard sizes with patch 16 and MLP ratio 4; ``overrides`` are fields of `ViTConfig`.

        Raises:
            ValueError: unknown name.
            TypeError: an override is not a field of `ViTConfig`.
        """
        check_choice("name", name, tuple(PRESETS))
        unknown = sorted(set(overrides) - {field.name for field in fields(ViTConfig)})
        if unknown:
            raise TypeError(f"overrides: expected fields of ViTConfig, got {', '.join(unknown)}")
        return cls(ViTConfig(**{**PRESETS[name], "img_size": img_size, **overrides}))

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def prefix_tokens(self) -> Tensor:
        """CLS token with its position: [1, D]."""
        return self.cls_token[0] + self.pos_embed[0, : self.num_prefix]

    def grid_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of the cells of ``grid``, resized when it is not the stored one: [rows * cols, D]."""
        return resize_positions(self.pos_embed[0, self.num_prefix :], self.config.grid, grid, self.config.position_rule)

    def forward(self, images: Tensor) -> Tensor:
        """Dense forward.

        Args:
            images: [B, C, H, W], normalised, in the parameters' dtype; padded bottom/right to the patch size.

        Returns:
            [B, 1 + rows * cols, D]: CLS, then the patches in raster order, after the final norm.

        Raises:
            TypeError, ValueError: images of a wrong type, dtype, shape or device, or empty.
        """
        check_images(images, self.patch_embed.proj.weight)
        grid = patch_grid(images.shape[2], images.shape[3], self.patch_size)
        patches = self.patch_embed(pad_to_patches(images, self.patch_size)) + self.grid_positions(grid)
        x = torch.cat((self.prefix_tokens().expand(images.shape[0], -1, -1), patches), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
