"""A transformer block on a dense batch, with a choice of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from step_kernels.model.vit import Block

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k and v [B, H, L, D]


def stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matmul, softmax, matmul: [B, H, L, L] goes to memory, as in the code that CTS and DToP are built on."""
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, on the backend that PyTorch picks."""
    return F.scaled_dot_product_attention(q, k, v)


def transformer_block(block: Block, tokens: Tensor, attend: Attend) -> Tensor:
    """[B, L, D] -> [B, L, D]."""
    batch, length, dim = tokens.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(tokens)).view(batch, length, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    tokens = tokens + block.attn.proj(attend(q, k, v).transpose(1, 2).reshape(batch, length, dim))
    return tokens + cast(Tensor, block.mlp(block.norm2(tokens)))
