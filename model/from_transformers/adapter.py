"""TransformersViT: a vision transformer of Hugging Face transformers, run on packed tokens by its own parts."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ... import SupertokenLayout
from ...checks import describe
from ...merge import Resample
from ...numerics import accumulator
from ..blocks import BlockInputs
from ..foreign.blocks import row_norm, run_block
from ..foreign.parts import check_convolution, refused
from ..foreign.rope import axial_turns, centred_turns
from ..images import check_images
from ..vit import PackedViT, resize_positions
from .parts import TRANSFORMERS, View, block_of, either, family_of

__all__ = ["TransformersViT"]

POSITION_RULES = {  # how a family resizes its position embeddings; the others have none, or of one grid only
    "vit": "plain bicubic",
    "clip": "plain bicubic",
    "siglip": "plain bicubic",
    "dinov2": "plain bicubic",
    "dinov2_with_registers": "bicubic",
    "siglip2": "antialiased bilinear",
}


class TransformersViT(PackedViT):
    """``model`` as `StepEncoder` sees it. Parameters stay where they are: shared, neither copied nor wrapped.

    Images of any size run, cut to whole patches as transformers does; position embeddings are resized by the rule of their family, as with
    ``interpolate_pos_encoding=True`` where a model has it. Of an ``EomtForUniversalSegmentation`` these are the blocks before its queries enter.
    Argument and errors: those of `StepEncoder.from_transformers`. Parts are looked at as `TimmViT`'s are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a transformers model, got {describe(model)}")
        TRANSFORMERS.check(model)
        version = sys.modules["transformers"].__version__
        if int(version.partition(".")[0]) < 5:
            raise refused("vit", type(model).__name__, f"expected transformers >= 5, got {version}")
        self.model: Any = model
        self.family: Any = family_of(model)
        self.training = model.training
        if isinstance(self.patch_layer, nn.Conv2d):
            check_convolution(self.patch_layer, "vit.embeddings")

    @property
    def root(self) -> Any:
        """What holds the embeddings and the layers."""
        return getattr(self.model, "vision_model", self.model)

    @property
    def layers(self) -> Any:
        """All of the model's layers."""
        return either(either(self.root, "encoder", "model") or self.root, "layer", "layers")

    @property
    def patch_layer(self) -> Any:
        layer = either(self.root.embeddings, "patch_embeddings", "patch_embedding")
        return getattr(layer, "projection", layer)

    @property
    def embedding(self) -> Any:
        """The convolution of the patch embedding; Siglip2's linear layer in that form."""
        layer = self.patch_layer
        if isinstance(layer, nn.Conv2d):
            return layer
        size = self.model.config.patch_size
        weight = layer.weight.unflatten(1, (size, size, -1)).permute(0, 3, 1, 2)
        return View(weight=weight, bias=layer.bias, out_channels=weight.shape[0], kernel_size=(size, size))

    @property
    def depth(self) -> int:
        return len(self.layers) - (self.model.config.num_blocks if self.family == "eomt" else 0)

    @property
    def num_prefix(self) -> int:
        embeddings = self.root.embeddings
        registers = getattr(embeddings, "register_tokens", None)
        return int(self._class_token() is not None) + (0 if registers is None else registers.shape[1])

    def _class_token(self) -> Tensor | None:
        return either(self.root.embeddings, "cls_token", "class_embedding")

    def _positions(self) -> tuple[Tensor | None, Tensor | None]:
        """The class token's position [1, D] and those of the patches [N, D]."""
        stored = either(self.root.embeddings, "position_embeddings", "position_embedding")
        if stored is None:
            return None, None
        table = stored.weight if isinstance(stored, nn.Embedding) else stored[0]
        slots = int(self._class_token() is not None and self.family != "eomt")
        return table[:slots] if slots else None, table[slots:]

    def prefix_tokens(self) -> Tensor:
        """CLS token, with its position where it has one, and registers: [num_prefix, D]."""
        token, position = self._class_token(), self._positions()[0]
        registers = getattr(self.root.embeddings, "register_tokens", None)
        tokens = [] if token is None else [token.reshape(1, -1) + (0 if position is None else position)]
        tokens += [] if registers is None else [registers[0]]
        return torch.cat(tokens) if tokens else self.patch_layer.weight.new_empty(0, self.embed_dim)

    @property
    def own_grid(self) -> tuple[int, int] | None:
        """(rows, cols) of the position embeddings; None without."""
        positions, size = self._positions()[1], getattr(self.model.config, "image_size", None)
        if positions is None:
            return None
        if size is None:
            return (math.isqrt(len(positions)),) * 2
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return height // self.patch_size, width // self.patch_size

    def grid_positions(self, grid: tuple[int, int]) -> Tensor | None:
        positions, own, rule = self._positions()[1], self.own_grid, POSITION_RULES.get(self.family)
        if positions is None or own is None:
            return None
        if grid == own and (own[0] == own[1] or not self.family.startswith("dinov2")):
            return positions
        side = math.isqrt(len(positions))
        if rule is None or side**2 != len(positions):
            why = "its positions are those of this grid" if rule is None else "transformers resizes square grids only"
            raise ValueError(
                f"images: expected a grid of {own[0]} x {own[1]} patches, since {why}, got {grid[0]} x {grid[1]}"
            )
        return resize_positions(positions, (side, side), grid, rule)

    def on_grid(self, images: object) -> tuple[Tensor, tuple[int, int]]:
        """``images`` without what exceeds whole patches at the bottom and right, and their grid (rows, cols)."""
        weight, size = self.embedding.weight, self.patch_size
        pixels = check_images(images, weight)
        rows, cols = pixels.shape[2] // size, pixels.shape[3] // size
        if not rows or not cols:
            raise ValueError(
                f"images: expected at least {size} x {size} pixels, one patch, got shape {list(pixels.shape)}"
            )
        return pixels[:, :, : rows * size, : cols * size].contiguous(), (rows, cols)

    def packed_embedding(self, images: Tensor, layout: SupertokenLayout, resample: Resample) -> Tensor:
        TRANSFORMERS.check(self.model)  # a wrapper or hook put in later would be passed over too
        tokens = super().packed_embedding(images, layout, resample)
        dropout, norm = getattr(self.root.embeddings, "dropout", None), getattr(self.root, "pre_layrnorm", None)
        tokens = tokens if dropout is None else dropout(tokens)
        return tokens if norm is None else row_norm(norm, tokens, layout)

    def turns(self, layout: SupertokenLayout) -> tuple[Tensor, Tensor] | None:
        rope = getattr(self.root, "rope_embeddings", None)
        if rope is None:
            return None
        names = [f"pos_embed_{change}" for change in ("shift", "jitter", "rescale")]
        changing = [name for name in names if getattr(rope.config, name, None) is not None]
        if rope.training and changing:
            why = f"its coordinates change at random in training: set config.{changing[0]} to None"
            raise refused("vit.rope_embeddings", type(rope).__name__, why)
        frequencies = rope.inv_freq.to(layout.device, accumulator(self.embedding.weight.dtype))
        return axial_turns(centred_turns(1 / frequencies, layout.grid))

    def packed_block(self, number: int, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        layer = self.layers[number - 1]
        run = functools.partial(run_block, block_of(layer))
        if not (getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()):
            return run(tokens, inputs)
        checkpoint = layer._gradient_checkpointing_func
        if getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False:
            why = "its gradient checkpointing: expected use_reentrant=False"
            raise refused(f"vit's layer {number - 1}", type(layer).__name__, why)
        return checkpoint(run, tokens, inputs)

    @property
    def final_norm(self) -> Any:
        """The norm that makes ``last_hidden_state``; CLIP's leaves patches alone."""
        return nn.Identity() if self.family == "clip" else either(self.root, "layernorm", "norm", "post_layernorm")

    def packed_norm(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        return row_norm(self.final_norm, tokens, layout)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """transformers' own dense forward."""
        return self.model(*inputs, **named)
