"""TimmViT: a timm VisionTransformer or Eva model, run on packed tokens by its own parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import SupertokenLayout, embed_patches, merge_tokens
from ...checks import check_choice, check_grid, describe
from ...merge import Resample
from ...numerics import accumulator
from ..blocks import TAIL, BlockInputs
from ..foreign.blocks import row_norm, run_block
from ..foreign.parts import check_convolution, class_name, refused
from ..foreign.verify import check_equal
from ..vit import POSITION_RULES, PackedViT, resize_positions
from .parts import TIMM
from .rope import check_rope, turns_per_cell

__all__ = ["TimmViT", "check_equal_features"]


class TimmViT(PackedViT):
    """``model`` as `StepEncoder` sees it. Parameters stay where they are: shared, neither copied nor wrapped.

    Images of any size run, padded to the patch size, with position embeddings resized as timm's ``dynamic_img_size`` does, or by another rule.
    Arguments and errors: those of `StepEncoder.from_timm`. Parts are looked at in each run, as they may be replaced and hooks added later;
    compiled ones as they are compiled.
    """

    def __init__(self, model: nn.Module, position_rule: str = "bicubic") -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"vit: expected a timm model, got {describe(model)}")
        TIMM.check(model)
        check_embedding(model)
        check_rope(model)
        self.model: Any = model
        check_choice("position_rule", position_rule, tuple(POSITION_RULES))
        self.position_rule = position_rule
        self.training = model.training

    num_prefix = property(lambda self: self.model.num_prefix_tokens)
    patch_embed = property(lambda self: self.model.patch_embed)
    blocks = property(lambda self: self.model.blocks)
    norm = property(lambda self: self.model.norm)

    def prefix_tokens(self) -> Tensor:
        """CLS, distillation and register tokens, with their positions where they have any: [num_prefix, D]."""
        model = self.model
        every = model.cls_token, getattr(model, "dist_token", None), model.reg_token
        tokens = [token[0] for token in every if token is not None]
        if not tokens:
            return self.embedding.weight.new_empty(0, self.embed_dim)
        prefix = torch.cat(tokens)
        slots = position_slots(model)
        return prefix + model.pos_embed[0, :slots] if slots else prefix

    def grid_positions(self, grid: tuple[int, int]) -> Tensor | None:
        model = self.model
        if model.pos_embed is None:
            return None
        stored = check_grid("grid_size", model.patch_embed.grid_size)
        return resize_positions(model.pos_embed[0, position_slots(model) :], stored, grid, self.position_rule)

    def packed_embedding(self, images: Tensor, layout: SupertokenLayout, resample: Resample) -> Tensor:
        model = self.model
        TIMM.check(model)  # a wrapper or hook put in later would be passed over too
        plain = isinstance(model.patch_embed.norm, nn.Identity)
        embedding = super().packed_embedding if plain else self._normed_embedding
        tokens = embedding(images, layout, resample)
        if model.pos_embed is not None or class_name(model) == "Eva":  # as timm has it
            tokens = model.pos_drop(tokens)
        return row_norm(model.norm_pre, tokens, layout)

    def _normed_embedding(self, images: Tensor, layout: SupertokenLayout, resample: Resample) -> Tensor:
        """With a norm between the convolution and the positions, which are therefore pooled by themselves."""
        patch_norm, positions = self.model.patch_embed.norm, self.grid_positions(layout.grid)
        if resample != "area":
            why = "its positions are pooled by resample='area' only"
            raise refused("patch_embed.norm", class_name(patch_norm), why)
        weight, bias = self.embedding.weight, self.embedding.bias
        patches = row_norm(patch_norm, embed_patches(images, layout, weight, bias, tail=TAIL), layout)
        if positions is None:
            positions = weight.new_zeros(layout.grid[0] * layout.grid[1], self.embed_dim)
        every_image = positions.contiguous().expand(layout.batch_size, -1, -1)  # resized ones are transposed
        others = merge_tokens(every_image, layout, prefix=self.prefix_tokens(), tail=TAIL)
        is_prefix = layout.cells[:, 3:] == 0
        return torch.where(is_prefix, others, patches + others)

    def turns(self, layout: SupertokenLayout) -> tuple[Tensor, Tensor] | None:
        rope, dtype = getattr(self.model, "rope", None), accumulator(self.embedding.weight.dtype)
        return None if rope is None else turns_per_cell(rope, layout.grid, layout.device, dtype)

    def packed_block(self, number: int, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        block = self.model.blocks[number - 1]
        if self.model.grad_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(run_block, block, tokens, inputs, use_reentrant=False)
        return run_block(block, tokens, inputs)

    def packed_norm(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        return row_norm(self.model.norm, tokens, layout)

    def forward(self, images: Tensor) -> Tensor:
        """timm's own dense forward: class scores."""
        return self.model(images)


def position_slots(model: Any) -> int:
    """Prefix tokens that have a slot in the position embedding: all or none."""
    if model.pos_embed is None:
        return 0
    rows, cols = model.patch_embed.grid_size
    return model.pos_embed.shape[1] - rows * cols


def check_embedding(model: Any) -> None:
    """Refuse a patch embedding that is no square, non-overlapping convolution, and positions of unknown slots."""
    check_convolution(model.patch_embed.proj, "vit.patch_embed.proj")
    if model.patch_embed.grid_size is None:
        raise refused("vit.patch_embed", "PatchEmbed", "expected a model made for an img_size, got None")
    if position_slots(model) not in (0, model.num_prefix_tokens):
        why = f"expected a position for each patch, got {describe(model.pos_embed)}"
        raise refused("vit.pos_embed", class_name(model), why)


def check_equal_features(vit: TimmViT, features: Callable[[Tensor], Tensor]) -> None:
    """RuntimeError where ``features`` and timm's own ``forward_features``, in eval mode, differ by more than rounding.

    On one image: two patches by three where the model takes any size, else of its own size.
    """
    dynamic = getattr(vit.model, "dynamic_img_size", False) and vit.position_rule == "bicubic"  # timm's own
    size = (2 * vit.patch_size, 3 * vit.patch_size) if dynamic else vit.model.patch_embed.img_size
    check_equal(vit, size, lambda image: [features(image)], lambda image: [vit.model.forward_features(image)])
