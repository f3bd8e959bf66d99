"""Pre-norm transformer blocks of other libraries on packed tokens: the parts that a `Catalogue` lets through, run through the ragged ops.

A block has timm's attributes: ``norm1``, ``attn``, ``norm2``, ``mlp`` and so on. Equivalent PyTorch, row by row: its own ``block(x)``. What acts
on rows or elements (other norms than LayerNorm, activations, dropout) is the module itself, called on packed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import SupertokenLayout, ragged_attention, ragged_linear, ragged_rope
from ..blocks import TAIL, BlockInputs, packed_linear, packed_norm, plain_block, plain_parts
from .parts import class_name, refused

__all__ = ["row_norm", "run_block"]

Part = Any  # of a model: its attributes are those of its class, which `Catalogue.check` has checked

FUSED_GELU = {
    ("GELU", "none"): "gelu",
    ("GELUActivation", "none"): "gelu",
    ("GELU", "tanh"): "gelu_tanh",
    ("GELUTanh", "none"): "gelu_tanh",
}
PLAIN = ["Attention", "Mlp", "LayerNorm", "LayerNorm", "GELU", *["Identity"] * 4]


def run_block(block: Part, tokens: Tensor, inputs: BlockInputs) -> Tensor:
    """``block`` on [capacity, D] packed tokens, attention within each image."""
    layout, attn, mlp = inputs.layout, block.attn, block.mlp
    parts = plain_parts(block, tokens, layout) if is_plain(block, inputs) else None
    if parts is not None:
        return plain_block(block, parts, tokens, inputs, (layer_scale(block, 1), layer_scale(block, 2)))
    mixed = attention(attn, row_norm(block.norm1, tokens, layout), inputs)
    tokens = add_branch(mixed, attn.proj, attn.proj_drop, block, 1, tokens, layout)
    hidden = mlp_hidden(mlp, row_norm(block.norm2, tokens, layout), layout)
    return add_branch(hidden, mlp.fc2, mlp.drop2, block, 2, tokens, layout)


def is_plain(block: Part, inputs: BlockInputs) -> bool:
    """Whether nothing acts in the block but what `plain_block` computes."""
    if not hasattr(block, "_modules"):  # put together from the parts of a block of another kind
        return False
    own, attn, mlp = block._modules, block.attn._modules, block.mlp._modules
    parts = own["attn"], own["mlp"], own["norm1"], own["norm2"], mlp["act"]
    drops = attn["attn_drop"], attn["proj_drop"], mlp["drop1"], mlp["drop2"], own["drop_path1"], own["drop_path2"]
    kinds = [class_name(part) for part in (*parts, attn["q_norm"], attn["k_norm"], attn["norm"], mlp["norm"])]
    exact = kinds == PLAIN and mlp["act"].approximate == "none" and block.attn.fused_attn
    return exact and inputs.rotations is None and not any([drop.training for drop in drops])


def row_norm(norm: Part, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
    """``norm`` of each row."""
    return packed_norm(norm, tokens, layout) if class_name(norm) == "LayerNorm" else norm(tokens)


def attention(attn: Part, x: Tensor, inputs: BlockInputs) -> Tensor:
    """Self-attention within each image, up to the output projection: [capacity, heads * head_dim]."""
    if is_active(attn.attn_drop):
        raise refused("attn_drop", class_name(attn.attn_drop), "attention's own dropout cannot be applied in training")
    layout = inputs.layout
    q, k, v = (rows.unflatten(1, (heads, -1)) for rows, heads in projections(attn, x, layout))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if inputs.rotations is not None:
        half = getattr(attn, "rotate_half", False)
        q, k = ragged_rope(q, k, inputs.rotations, rotate_half=half, layout=layout, tail=TAIL)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # grouped queries: heads of keys and values are shared
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = None if attn.fused_attn else attn.scale  # fused, timm leaves it to PyTorch, whatever ``attn.scale`` says
    mixed = ragged_attention(q, k, v, layout, scale=scale, schedule=inputs.schedule, tail=TAIL).flatten(1)
    mixed = row_norm(attn.norm, mixed, layout)
    gate = getattr(attn, "gate", None)
    return mixed if gate is None else mixed * packed_linear(gate, x, layout).sigmoid()


def projections(attn: Part, x: Tensor, layout: SupertokenLayout) -> list[tuple[Tensor, int]]:
    """Queries, keys and values as rows, each with its number of heads."""
    if attn.qkv is None:
        kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        pairs = (attn.q_proj, attn.num_heads), (attn.k_proj, kv_heads), (attn.v_proj, kv_heads)
        return [(packed_linear(layer, x, layout), heads) for layer, heads in pairs]
    if getattr(attn, "q_bias", None) is None:
        qkv = packed_linear(attn.qkv, x, layout)
    else:  # timm itself does not call the layer
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = ragged_linear(x, attn.qkv.weight, bias, layout=layout, tail=TAIL)
    return [(rows, attn.num_heads) for rows in qkv.unflatten(1, (3, -1)).unbind(1)]


def mlp_hidden(mlp: Part, x: Tensor, layout: SupertokenLayout) -> Tensor:
    """An Mlp, GluMlp or SwiGLU up to its last linear layer: [capacity, hidden]."""
    if hasattr(mlp, "fc1_g"):
        hidden = mlp.act(packed_linear(mlp.fc1_g, x, layout)) * packed_linear(mlp.fc1_x, x, layout)
    elif hasattr(mlp, "gate_last"):
        left, right = packed_linear(mlp.fc1, x, layout).chunk(2, dim=1)
        hidden = left * mlp.act(right) if mlp.gate_last else mlp.act(left) * right
    else:
        fused = FUSED_GELU.get((class_name(mlp.act), getattr(mlp.act, "approximate", "none")))
        hidden = packed_linear(mlp.fc1, x, layout, activation=fused)
        hidden = hidden if fused else mlp.act(hidden)
    return row_norm(mlp.norm, mlp.drop1(hidden), layout)


def layer_scale(block: Part, number: int) -> Tensor | None:
    """LayerScale of the block's first or second branch: `LayerScale` or a bare parameter; None without."""
    scale = getattr(block, f"ls{number}", None)
    return getattr(block, f"gamma_{number}", None) if scale is None else getattr(scale, "gamma", None)


def add_branch(
    x: Tensor, layer: nn.Linear, drop: Part, block: Part, number: int, tokens: Tensor, layout: SupertokenLayout
) -> Tensor:
    """tokens + drop_path(gamma * drop(layer(x))), the block's first or second branch; one op where nothing is dropped."""
    gamma, drop_path = layer_scale(block, number), getattr(block, f"drop_path{number}")
    if not is_active(drop) and not is_active(drop_path):
        return packed_linear(layer, x, layout, gamma=gamma, residual=tokens)
    branch = drop(packed_linear(layer, x, layout))
    if gamma is not None:
        branch = branch * gamma
    if is_active(drop_path):  # as timm draws, one for each image: 0, or else 1 or, scaled, 1 / kept
        kept = 1 - drop_path.drop_prob
        draws = tokens.new_empty(layout.batch_size).bernoulli_(kept)
        draws = draws.div_(kept) if kept > 0 and getattr(drop_path, "scale_by_keep", True) else draws
        branch = branch * draws[layout.cells[:, 0].long(), None]
    return tokens + branch


def is_active(drop: Part) -> bool:
    """A Dropout or DropPath that drops something."""
    return drop.training and (getattr(drop, "p", 0.0) or getattr(drop, "drop_prob", 0.0) or 0.0) > 0
