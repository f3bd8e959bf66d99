"""A plain vision transformer with timm's parameter names: the dense model that STEP makes cheaper."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import SupertokenLayout, embed_patches
from ..checks import check_choice, check_grid, check_int, check_number, check_tensor, describe
from ..merge import Resample
from ..numerics import accumulator
from .blocks import TAIL, Block, BlockInputs, init_weights, packed_block, packed_norm
from .images import pad_images, patch_grid

__all__ = ["POSITION_RULES", "PRESETS", "PackedViT", "PatchEmbed", "ViT", "ViTConfig", "resize_positions"]

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

POSITION_RULES = {  # rule -> mode of ``F.interpolate``, antialiased or not; PyTorch's two bicubic filters always differ
    "bicubic": ("bicubic", True),
    "bilinear": ("bilinear", False),
    "plain bicubic": ("bicubic", False),
    "antialiased bilinear": ("bilinear", True),
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT.

    ``img_size`` is (height, width) in pixels, or one number for both, and only fixes the number of stored position
    embeddings: images of any size run, with the positions resized by ``position_rule`` (see `resize_positions`).
    ``num_prefix`` tokens precede the patches: 0, 1 (CLS) or, with a distillation token, 2. ``final_norm``: LayerNorm behind the blocks.

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
    num_prefix: int = 1
    final_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "patch_size", "in_chans", "num_prefix"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=int(name != "num_prefix")))
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
        check_choice("position_rule", self.position_rule, tuple(POSITION_RULES))

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
        rule: ``"bicubic"`` is timm's rule (bicubic with antialiasing, in fp32 or wider); ``"bilinear"`` is Segmenter's and
            ``"plain bicubic"`` mmsegmentation's, both without antialiasing; ``"antialiased bilinear"`` SigLIP 2's.

    Returns:
        [new_rows * new_cols, D] in the same dtype; ``positions`` itself when the grids are equal. Differentiable.

    Raises:
        TypeError, ValueError: a shape that does not fit ``old_grid``, an empty grid, an unknown rule.
    """
    check_choice("rule", rule, tuple(POSITION_RULES))
    old_grid, new_grid = check_grid("old_grid", old_grid), check_grid("new_grid", new_grid)
    check_tensor("positions", positions, (old_grid[0] * old_grid[1], "D"))
    if old_grid == new_grid:
        return positions
    mode, antialias = POSITION_RULES[rule]
    image = positions.to(accumulator(positions.dtype)).t().reshape(1, -1, *old_grid)
    image = F.interpolate(image, size=new_grid, mode=mode, align_corners=False, antialias=antialias)
    return image.flatten(2)[0].t().to(positions.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, C, H, W] -> [B, rows * cols, D]; H and W multiples of the patch size."""

    uncalled: ClassVar = {"proj": nn.Conv2d}

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PackedViT(nn.Module):
    """Base class of the vision transformers that `StepEncoder` runs: what it reads of one, and how one runs packed.

    A subclass has the attributes below and defines ``prefix_tokens`` and ``grid_positions``; `ViT` is the plain case, whose blocks
    are `Block`. One whose parts are of another make overrides ``turns`` and the ``packed_*`` methods.
    """

    patch_embed: Any  # its ``proj`` is the convolution of the patch embedding, ``patch_size`` square
    blocks: Any
    norm: Any  # behind the blocks
    num_prefix: Any  # int: prefix tokens of every image

    def prefix_tokens(self) -> Tensor:
        """What prefix rows hold at the encoder's input: [num_prefix, D]."""
        raise NotImplementedError

    def grid_positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Position embeddings of the cells of ``grid``: [rows * cols, D]; None for a model without."""
        raise NotImplementedError

    @property
    def embedding(self) -> nn.Conv2d:
        """The convolution of the patch embedding."""
        return self.patch_embed.proj

    @property
    def embed_dim(self) -> int:
        """D, the tokens' width."""
        return self.embedding.out_channels

    @property
    def patch_size(self) -> int:
        """Pixels per cell side."""
        return self.embedding.kernel_size[0]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def on_grid(self, images: object) -> tuple[Tensor, tuple[int, int]]:
        """``images``, checked, as whole patches, and their grid (rows, cols)."""
        return pad_images(images, self.embedding.weight)

    def packed_embedding(self, images: Tensor, layout: SupertokenLayout, resample: Resample) -> Tensor:
        """The first block's input: [capacity, D]. ``images`` are padded."""
        embedding, positions = self.embedding, self.grid_positions(layout.grid)
        parts = {"pos_embed": positions, "prefix": self.prefix_tokens()}
        return embed_patches(images, layout, embedding.weight, embedding.bias, **parts, resample=resample, tail=TAIL)

    def turns(self, layout: SupertokenLayout) -> tuple[Tensor, Tensor] | None:
        """Rotary positions as ``frequencies`` and ``phases`` of `rope_table`, by the layout's grid; None for a model without."""
        return None

    def block_inputs(self, layout: SupertokenLayout, earlier: BlockInputs | None = None) -> BlockInputs:
        """Built once after the merge and once after each exit, then from those before it."""
        return BlockInputs(layout, self.turns(layout) if earlier is None else earlier.turns)

    def packed_block(self, number: int, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """Block ``number`` (1-based) on [capacity, D]."""
        return packed_block(self.blocks[number - 1], tokens, inputs, f"vit.blocks.{number - 1}")

    def packed_norm(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        """The norm behind the blocks."""
        return packed_norm(self.norm, tokens, layout)


class ViT(PackedViT):
    """Dense vision transformer: ``vit(images)`` -> [B, num_prefix + rows * cols, D] after the final norm, if there is one.

    Prefix tokens ``cls_token`` [1, num_prefix, D]; position embeddings for them and for every cell of ``config.grid``. Parameter names are timm's.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), in timm's pre-norm form.

    Args:
        config: the sizes; `ViT.preset` has the standard ones.

    Raises:
        TypeError: ``config`` is no `ViTConfig`.
    """

    num_prefix = property(lambda self: self.config.num_prefix)
    uncalled: ClassVar = {"patch_embed": PatchEmbed, "blocks": nn.ModuleList}

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if not isinstance(config, ViTConfig):
            raise TypeError(f"config: expected a ViTConfig, got {describe(config)}")
        self.config = config
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, self.num_prefix, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix + config.grid[0] * config.grid[1], dim))
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, mlp_ratio=config.mlp_ratio, eps=config.eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=config.eps) if config.final_norm else nn.Identity()
        if not self.cls_token.is_meta:  # where this would import PyTorch's decompositions, for seconds
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

    def prefix_tokens(self) -> Tensor:
        """Prefix tokens with their positions: [num_prefix, D]."""
        return self.cls_token[0] + self.pos_embed[0, : self.num_prefix]

    def grid_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of the cells of ``grid``, resized when it is not the stored one: [rows * cols, D]."""
        return resize_positions(self.pos_embed[0, self.num_prefix :], self.config.grid, grid, self.config.position_rule)

    def forward(self, images: Tensor) -> Tensor:
        """Dense forward.

        Args:
            images: [B, C, H, W], normalised, in the parameters' dtype; padded bottom/right to the patch size.

        Returns:
            [B, num_prefix + rows * cols, D]: the prefix, then the patches in raster order, after the final norm.

        Raises:
            TypeError, ValueError: images of a wrong type, dtype, shape or device, or empty.
        """
        pixels, grid = pad_images(images, self.embedding.weight)
        patches = self.patch_embed(pixels) + self.grid_positions(grid)
        x = torch.cat((self.prefix_tokens().expand(images.shape[0], -1, -1), patches), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
