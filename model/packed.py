"""A transformer block on packed tokens: the parameters of a dense `Block`, run through the ragged ops."""

from __future__ import annotations

from torch import Tensor, nn

from .. import SupertokenLayout, attention_schedule, ragged_attention, ragged_layer_norm, ragged_linear
from .vit import Attention, Block

__all__ = ["packed_attention", "packed_block", "packed_norm", "stage_schedule"]

TAIL = "undefined"  # rows past the live count: nothing in the model reads them, so nothing fills them


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
