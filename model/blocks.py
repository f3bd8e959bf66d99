"""Transformer blocks: dense modules, and beside each how its parameters run on packed tokens, through the ragged ops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import SupertokenLayout, attention_schedule, ragged_attention, ragged_layer_norm, ragged_linear, rope_table
from ..attention import unchecked_attention
from ..backend import floor_of
from ..checks import values
from ..library import all_plain, unobserved
from ..modules import are_untouched, check_uncalled, is_plain, is_pytorchs
from ..norm import unchecked_layer_norm
from ..reference.linear import APPROXIMATE, linear_of_all_rows

__all__ = ["TAIL", "Block", "BlockInputs", "init_weights", "packed_block", "packed_linear", "packed_norm"]

PLAIN = (nn.LayerNorm, nn.Linear, nn.Linear) * 2
Parts = list[tuple[Tensor, Tensor]]  # weight and bias of each
TAIL: Final = "undefined"  # rows past the live count: nothing in the model reads them, so nothing fills them


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What the blocks that run on one layout share."""

    layout: SupertokenLayout
    turns: tuple[Tensor, Tensor] | None = None  # of `PackedViT.turns`, alike for all layouts of one grid
    rotations: Tensor | None = field(init=False)  # `rope_table` of them; None for a model without rotary positions
    schedule: Tensor = field(init=False)  # attention's tiles

    def __post_init__(self) -> None:
        rotations = None if self.turns is None else rope_table(self.layout, *self.turns, tail=TAIL)
        object.__setattr__(self, "rotations", rotations)
        object.__setattr__(self, "schedule", attention_schedule(self.layout))


def packed_linear(linear: nn.Linear, tokens: Tensor, layout: SupertokenLayout, **epilogue: Any) -> Tensor:
    """``linear`` on the live rows; ``epilogue`` as of `ragged_linear`. One with an adapter or a hook is called, on all rows."""
    if is_plain(linear, nn.Linear):
        return ragged_linear(tokens, linear.weight, linear.bias, layout=layout, tail=TAIL, **epilogue)
    out, gamma, residual = linear(tokens), epilogue.get("gamma"), epilogue.get("residual")
    if epilogue.get("activation"):
        out = F.gelu(out, approximate=APPROXIMATE[epilogue["activation"]])
    out = out if gamma is None else out * gamma
    return out if residual is None else out + residual


def packed_norm(norm: nn.LayerNorm, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
    """``norm`` on the live rows."""
    if not is_plain(norm, nn.LayerNorm):
        return norm(tokens)
    return ragged_layer_norm(tokens, norm.weight, norm.bias, norm.eps, layout=layout, tail=TAIL)


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


def packed_attention(attn: Attention, tokens: Tensor, inputs: BlockInputs, *, residual: Tensor) -> Tensor:
    """Self-attention within each image, output projection and residual; queries, keys, values are views of one qkv."""
    layout = inputs.layout
    qkv = packed_linear(attn.qkv, tokens, layout)
    q, k, v = qkv.unflatten(1, (3, attn.num_heads, -1)).unbind(1)  # [capacity, H, head_dim] each
    mixed = ragged_attention(q, k, v, layout, schedule=inputs.schedule, tail=TAIL)
    return packed_linear(attn.proj, mixed.flatten(1), layout, residual=residual)


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

    uncalled: ClassVar = {"attn": Attention, "mlp": Mlp}

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


KINDS = (Block, nn.LayerNorm, Attention, nn.LayerNorm, Mlp)  # of a plain block and its parts


def packed_block(block: Block, tokens: Tensor, inputs: BlockInputs, path: str = "block") -> Tensor:
    """``block`` on [capacity, D] packed tokens, attention within each image; the same as ``block(dense)`` row by row. ``path``: for errors."""
    if not torch.compiler.is_compiling():
        kinds = type(block), *[type(part) for part in block._modules.values()]
        parts = plain_parts(block, tokens, inputs.layout) if kinds == KINDS else None
        if parts is not None:
            return plain_block(block, parts, tokens, inputs)
    check_uncalled(path, block, Block)
    layout, mlp = inputs.layout, block.mlp
    tokens = packed_attention(block.attn, packed_norm(block.norm1, tokens, layout), inputs, residual=tokens)
    hidden = packed_linear(mlp.fc1, packed_norm(block.norm2, tokens, layout), layout, activation="gelu")
    return packed_linear(mlp.fc2, hidden, layout, residual=tokens)


def plain_parts(block: Block, tokens: Tensor, layout: SupertokenLayout) -> Parts | None:
    """The block's weights and biases in the order of their use, for `plain_block`; None unless the mode is exact, without gradients, nothing
    else is on, and the norms, which may have been replaced, go with the tokens."""
    if not layout.trimmed or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if values() or torch._C._is_any_autocast_enabled() or tokens.shape[0] != layout.capacity:
        return None
    parts: Any = block._modules  # past nn.Module's look-up of attributes, which costs more than all of this
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    modules = parts["norm1"], attn["qkv"], attn["proj"], parts["norm2"], mlp["fc1"], mlp["fc2"]
    kinds = [is_pytorchs(type(part), kind) for part, kind in zip(modules, PLAIN, strict=True)]
    if not all(kinds) or not are_untouched(block, (parts["attn"], parts["mlp"], *modules)):
        return None
    own = [part._parameters for part in modules]
    found: Any = [(tensors["weight"], tensors["bias"]) for tensors in own]
    width, dtype = tokens.shape[1:], tokens.dtype
    fit = all([p is None or (p.shape == width and p.dtype == dtype) for p in (*found[0], *found[3])])
    return found if fit and tokens.is_contiguous() else None


def plain_block(block: Block, parts: Parts, tokens: Tensor, inputs: BlockInputs, scales: Any = (None, None)) -> Tensor:
    """What `packed_block` computes with `plain_parts`, and LayerScale's ``scales``, at a third of its price on the host."""
    norm1, qkv_parts, proj, norm2, fc1, fc2 = parts
    layer_norm, attention = unchecked_layer_norm, unchecked_attention
    if unobserved() and all_plain((tokens, *parts)):  # nobody waits for the ops: their mere functions
        layer_norm = floor_of("norm", "ragged_layer_norm", tokens.device, tokens.dtype)
        attention = floor_of("attention", "ragged_attention", tokens.device, tokens.dtype)
    normed = layer_norm(tokens, *norm1, block.norm1.eps, None, False)
    qkv, heads, layout = F.linear(normed, *qkv_parts), block.attn.num_heads, inputs.layout
    q, k, v = qkv.view(qkv.shape[0], 3, heads, qkv.shape[1] // (3 * heads)).unbind(1)
    mixed, _ = attention(q, k, v, layout.cu_seqlens, None, None, inputs.schedule, False, False, layout.max_seqlen)
    tokens = linear_of_all_rows(mixed.flatten(1), *proj, gamma=scales[0], residual=tokens)
    normed = layer_norm(tokens, *norm2, block.norm2.eps, None, False)
    hidden = linear_of_all_rows(normed, *fc1, activation="gelu")
    return linear_of_all_rows(hidden, *fc2, gamma=scales[1], residual=tokens)


def init_weights(module: nn.Module) -> None:
    """timm's initialisation of linear layers (truncated normal, zero bias); for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
