"""The vision transformers of Hugging Face transformers: what they are made of, and a layer's parts under timm's names.

Class names without their family's prefix (``ViTLayer`` is ``Layer``). Releases differ in names: a table holds those of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..foreign.parts import ACTIVATION, BLOCKS, HEAD, LEAVES, Catalogue, Parts, class_name

__all__ = ["TRANSFORMERS", "View", "block_of", "either", "family_of"]

# The module that defines a family -> the prefix of its classes.
PREFIXES = {
    "vit": "ViT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "dinov3_vit": "DINOv3ViT",
    "clip": "CLIP",
    "siglip": "Siglip",
    "siglip2": "Siglip2",
    "eomt": "Eomt",
}
FAMILIES = {f"transformers.models.{family}.modeling_{family}": family for family in PREFIXES}

REASONS = dict.fromkeys(("CLIPModel", "SiglipModel", "Siglip2Model"), "pass its vision_model")


def family_of(module: nn.Module) -> str | None:
    """A key of `PREFIXES`; None for another's class."""
    return FAMILIES.get(type(module).__module__)


def bare_name(module: nn.Module) -> str:
    """The class's name without its family's prefix, where the rest is in the table."""
    family, name = family_of(module), type(module).__name__
    if family is None:
        return class_name(module)
    rest = name[len(PREFIXES[family]) :] if name.lower().startswith(PREFIXES[family].lower()) else name
    return rest if rest in PARTS and name not in REASONS else name


NORM, LINEAR, DROPOUT, DROP_PATH = ("LayerNorm",), ("Linear",), ("Dropout",), ("DropPath", "Identity")
ENCODER: Mapping[str, tuple[str, ...] | None] = {
    "vision_model": ("VisionTransformer",),
    "embeddings": ("Embeddings", "VisionEmbeddings"),
    "rope_embeddings": ("RopePositionEmbedding",),
    "pre_layrnorm": NORM,
    **dict.fromkeys(("encoder", "model"), ("Encoder",)),
    **dict.fromkeys(("layer", "layers"), BLOCKS),
    **dict.fromkeys(("layernorm", "norm", "post_layernorm"), NORM),
    **dict.fromkeys(("pooler", "head"), HEAD),
}
SEGMENTATION = dict.fromkeys(("query", "upscale_block", "mask_head", "class_predictor", "criterion"), HEAD)
TOKENS = {"cls_token", "mask_token", "register_tokens", "position_embeddings", "class_embedding", "position_ids"}
EMBEDDINGS = {
    **dict.fromkeys(("patch_embeddings", "patch_embedding"), ("PatchEmbeddings", "Conv2d", "Linear")),
    **dict.fromkeys(("position_embeddings", "position_embedding"), ("Embedding",)),
    "dropout": DROPOUT,
}
PROJECTIONS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "query", "key", "value", "o_proj", "out_proj"), LINEAR)
LAYER = {
    **dict.fromkeys(("norm1", "norm2", "layernorm_before", "layernorm_after", "layer_norm1", "layer_norm2"), NORM),
    **dict.fromkeys(("attention", "self_attn"), ("Attention",)),
    "mlp": ("MLP", "GatedMLP", "SwiGLUFFN"),
    "intermediate": ("Intermediate",),
    "output": ("Output",),
    **dict.fromkeys(("layer_scale1", "layer_scale2"), ("LayerScale",)),
    "drop_path": DROP_PATH,
    "dropout": DROPOUT,
}
MLP = {
    **dict.fromkeys(("fc1", "fc2", "gate_proj", "up_proj", "down_proj", "weights_in", "weights_out", "dense"), LINEAR),
    **dict.fromkeys(("activation_fn", "activation", "act_fn", "intermediate_act_fn"), ACTIVATION),
    "dropout": DROPOUT,
}
MODELS = ("Model", "Backbone", "VisionModel", "VisionTransformer", "ForUniversalSegmentation")

PARTS: dict[str, Parts] = {
    **{name: Parts(ENCODER) for name in ("Model", "Backbone", "VisionModel", "VisionTransformer", "Encoder")},
    "ForUniversalSegmentation": Parts({**ENCODER, **SEGMENTATION}, frozenset({"attn_mask_probs"})),
    **{name: Parts(EMBEDDINGS, frozenset(TOKENS)) for name in ("Embeddings", "VisionEmbeddings")},
    "PatchEmbeddings": Parts({"projection": ("Conv2d",)}),
    "RopePositionEmbedding": Parts(tensors=frozenset({"inv_freq"})),
    **{name: Parts(LAYER) for name in ("Layer", "EncoderLayer")},
    "Attention": Parts({**PROJECTIONS, "attention": ("SelfAttention",), "output": ("SelfOutput",)}),
    "SelfAttention": Parts(PROJECTIONS),
    **{name: Parts(MLP) for name in ("MLP", "GatedMLP", "SwiGLUFFN", "Intermediate", "Output", "SelfOutput")},
    "LayerScale": Parts(tensors=frozenset({"lambda1"})),
    "Embedding": Parts(tensors=frozenset({"weight"})),
    **LEAVES,
}
LISTS = dict.fromkeys((*MODELS, "Encoder"), ("Layer", "EncoderLayer"))
TRANSFORMERS = Catalogue(PARTS, LISTS, REASONS, MODELS, bare_name)

NOTHING, SILU = nn.Identity(), nn.SiLU()


class View:
    """Parts under other names. (torch.compile does not trace ``types.SimpleNamespace``.)"""

    def __init__(self, **parts: Any) -> None:
        for name, part in parts.items():
            setattr(self, name, part)


def either(module: Any, *names: str) -> Any:
    """The first attribute that ``module`` has, or None."""
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def block_of(layer: Any) -> Any:
    """``layer`` with the attributes that `run_block` reads; its modules and parameters are the layer's own."""
    attn = either(layer, "attention", "self_attn")
    drop_path = getattr(layer, "drop_path", NOTHING)
    return View(
        norm1=either(layer, "norm1", "layernorm_before", "layer_norm1"),
        norm2=either(layer, "norm2", "layernorm_after", "layer_norm2"),
        attn=attention_of(attn, getattr(layer, "dropout", NOTHING)),
        mlp=mlp_of(layer),
        gamma_1=getattr(getattr(layer, "layer_scale1", None), "lambda1", None),
        gamma_2=getattr(getattr(layer, "layer_scale2", None), "lambda1", None),
        drop_path1=drop_path,
        drop_path2=drop_path,
    )


def attention_of(attn: Any, dropout: nn.Module) -> Any:
    inner, output = getattr(attn, "attention", attn), getattr(attn, "output", None)
    probability = either(inner, "attention_dropout", "dropout_prob", "dropout")
    return View(
        qkv=None,
        q_proj=either(inner, "q_proj", "query"),
        k_proj=either(inner, "k_proj", "key"),
        v_proj=either(inner, "v_proj", "value"),
        proj=either(attn, "o_proj", "out_proj") if output is None else output.dense,
        num_heads=either(inner, "num_attention_heads", "num_heads"),
        rotate_half=True,
        fused_attn=False,
        scale=either(inner, "scaling", "scale"),
        **dict.fromkeys(("q_norm", "k_norm", "norm"), NOTHING),
        attn_drop=nn.Dropout(probability) if inner.training and probability else NOTHING,
        proj_drop=dropout if output is None else output.dropout,
    )


def mlp_of(layer: Any) -> Any:
    mlp, drop = getattr(layer, "mlp", None), getattr(layer, "dropout", NOTHING)
    rest = {"drop1": NOTHING, "norm": NOTHING, "drop2": drop}
    if mlp is None:  # ViT before its layers had an MLP
        up, down = layer.intermediate, layer.output
        rest["drop2"] = down.dropout
        return View(fc1=up.dense, act=up.intermediate_act_fn, fc2=down.dense, **rest)
    if hasattr(mlp, "gate_proj"):
        return View(fc1_g=mlp.gate_proj, fc1_x=mlp.up_proj, act=mlp.act_fn, fc2=mlp.down_proj, **rest)
    if hasattr(mlp, "weights_in"):  # both halves in one layer
        return View(fc1=mlp.weights_in, act=SILU, gate_last=False, fc2=mlp.weights_out, **rest)
    act = either(mlp, "activation_fn", "activation", "act_fn")
    return View(fc1=either(mlp, "fc1", "up_proj"), act=act, fc2=either(mlp, "fc2", "down_proj"), **rest)
