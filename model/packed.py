"""A vision transformer on packed tokens: the parameters of dense modules, run through the ragged ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import (
    SupertokenLayout,
    attention_schedule,
    embed_patches,
    ragged_attention,
    ragged_layer_norm,
    ragged_linear,
)

if TYPE_CHECKING:
    from .vit import Attention, Block

__all__ = ["BlockInputs", "PackedViT", "packed_attention", "packed_block", "packed_norm", "stage_schedule"]

TAIL = "undefined"  # rows past the live count: nothing in the model reads them, so nothing fills them


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What the blocks that run on one layout share.

    Attributes:
        layout: of the tokens.
        schedule: attention's tiles.
        rotations: `rope_table` of the layout; None for a model without rotary positions.
        turns: what that table was made from, alike for all layouts of one grid.
    """

    layout: SupertokenLayout
    schedule: Tensor
    rotations: Tensor | None = None
    turns: tuple[Tensor, Tensor] | None = None


class PackedViT(nn.Module):
    """Base class of the vision transformers that `StepEncoder` runs: what it reads of one, and how one runs packed.

    A subclass defines the properties, ``prefix_tokens`` and ``grid_positions``, and has the attributes below; `ViT` is the plain
    case, whose blocks are `Block`. One whose parts are of another make overrides ``block_inputs`` and the ``packed_*`` methods.

    Attributes:
        patch_embed: its ``proj`` is the convolution of the patch embedding, ``patch_size`` square.
        blocks: the transformer blocks.
        norm: the norm behind them.
    """

    patch_embed: Any
    blocks: Any
    norm: Any

    @property
    def embed_dim(self) -> int:
        """D, the tokens' width."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of blocks."""
        raise NotImplementedError

    @property
    def patch_size(self) -> int:
        """Pixels per cell side."""
        raise NotImplementedError

    @property
    def num_prefix(self) -> int:
        """Prefix tokens of every image."""
        raise NotImplementedError

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

    def packed_embedding(self, images: Tensor, layout: SupertokenLayout, resample: str) -> Tensor:
        """The first block's input: [capacity, D]. ``images`` are padded."""
        return embed_patches(
            images,
            layout,
            self.embedding.weight,
            self.embedding.bias,
            pos_embed=self.grid_positions(layout.grid),
            prefix=self.prefix_tokens(),
            resample=resample,
            tail=TAIL,
        )

    def block_inputs(self, layout: SupertokenLayout, earlier: BlockInputs | None = None) -> BlockInputs:
        """Built once after the merge and once after each exit, then from those before it."""
        return BlockInputs(layout, stage_schedule(layout))

    def packed_block(self, number: int, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """Block ``number`` (1-based) on [capacity, D]."""
        return packed_block(self.blocks[number - 1], tokens, inputs.layout, inputs.schedule)

    def packed_norm(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        """The norm behind the blocks."""
        return packed_norm(self.norm, tokens, layout)

    def embedding_flops(self, tokens: int) -> int:
        """FLOPs of embedding ``tokens`` patches or supertokens."""
        return 2 * tokens * self.embedding.weight.numel()

    def block_flops(self, number: int, lengths: Sequence[int]) -> int:
        """FLOPs of block ``number`` (1-based) on sequences of these lengths, prefix tokens included."""
        return self.blocks[number - 1].flops(lengths)


def stage_schedule(layout: SupertokenLayout) -> Tensor:
    """The order of attention's tiles, shared by all blocks that run on this layout."""
    return attention_schedule(layout.cu_seqlens, layout.capacity)


def packed_block(block: Block, tokens: Tensor, layout: SupertokenLayout, schedule: Tensor) -> Tensor:
    """``block`` on [capacity, D] packed tokens, attention within each image; the same as ``block(dense)`` row by row."""
    normed = packed_norm(block.norm1, tokens, layout)
    tokens = packed_attention(block.attn, normed, layout, schedule, residual=tokens)
    normed = packed_norm(block.norm2, tokens, layout)
    mlp = block.mlp
    hidden = ragged_linear(normed, mlp.fc1.weight, mlp.fc1.bias, layout=layout, activation="gelu", tail=TAIL)
    return ragged_linear(hidden, mlp.fc2.weight, mlp.fc2.bias, layout=layout, residual=tokens, tail=TAIL)


def packed_attention(
    attn: Attention, tokens: Tensor, layout: SupertokenLayout, schedule: Tensor, *, residual: Tensor
) -> Tensor:
    """Self-attention within each image, output projection and residual; queries, keys, values are views of one qkv."""
    qkv = ragged_linear(tokens, attn.qkv.weight, attn.qkv.bias, layout=layout, tail=TAIL)
    head_dim = attn.proj.in_features // attn.num_heads
    q, k, v = qkv.view(-1, 3, attn.num_heads, head_dim).unbind(1)  # [capacity, H, head_dim] each
    mixed = ragged_attention(q, k, v, layout.cu_seqlens, layout.max_seqlen, schedule=schedule, tail=TAIL)
    return ragged_linear(
        mixed.flatten(1), attn.proj.weight, attn.proj.bias, layout=layout, residual=residual, tail=TAIL
    )


def packed_norm(norm: nn.LayerNorm, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
    """``norm`` on the live rows."""
    return ragged_layer_norm(tokens, norm.weight, norm.bias, norm.eps, layout=layout, tail=TAIL)
