"""What may stand where in a timm model that runs on packed tokens. Everything else is refused by name: never another network in silence."""

from __future__ import annotations

from collections.abc import Mapping

from ..foreign.parts import ACTIVATION, BLOCKS, HEAD, LEAVES, Catalogue, Parts

__all__ = ["TIMM"]

LINEAR, DROPOUT, DROP_PATH = ("Linear",), ("Dropout",), ("DropPath", "Identity")
NORM = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "RMSNorm", "SimpleNorm", "SimpleNormFp32")
MAYBE_NORM = (*NORM, "Identity")

REASONS = {
    "Beit": "it adds relative positions to the scores of attention",
    "DiffAttention": "differential attention subtracts two softmaxes",
    "DiffParallelScalingBlock": "differential attention subtracts two softmaxes",
    "EvaBlockPostNorm": "its norms follow attention and MLP",
    "Hiera": "its tokens are pooled between stages",
    "HybridEmbed": "its patches come from a CNN, whose receptive fields overlap",
    "PatchDropout": "patches are dropped at random in training: pass patch_drop_rate=0",
    "PatchDropoutWithIndices": "patches are dropped at random in training: pass patch_drop_rate=0",
    "ParallelScalingBlock": "attention and MLP run side by side",
    "ParallelThingsBlock": "several attentions and MLPs run side by side",
    "ResPostBlock": "its norms follow attention and MLP",
    "RotaryEmbeddingMRope": "its rotations differ from axis to axis of a sequence",
    "RotaryEmbeddingMixed": "its rotations differ from block to block and head to head",
    "SwinTransformer": "attention stays within shifted windows",
    "VisionTransformerSAM": "attention stays within windows and adds relative positions",
}


TOKENS = frozenset({"cls_token", "dist_token", "reg_token", "pos_embed"})
MODEL: Mapping[str, tuple[str, ...] | None] = {
    "patch_embed": ("PatchEmbed",),
    "pos_drop": DROPOUT,
    "patch_drop": ("Identity",),
    "norm_pre": MAYBE_NORM,
    "blocks": BLOCKS,
    "norm": MAYBE_NORM,
    **dict.fromkeys(("attn_pool", "fc_norm", "head_drop", "head", "head_dist"), HEAD),
}
ATTENTION = dict.fromkeys(("qkv", "gate", "proj"), LINEAR) | dict.fromkeys(("q_norm", "k_norm", "norm"), MAYBE_NORM)
ATTENTION |= {"attn_drop": DROPOUT, "proj_drop": DROPOUT}
SPLIT_ATTENTION = {**ATTENTION, "q_proj": LINEAR, "k_proj": LINEAR, "v_proj": LINEAR}
MLP = {"act": ACTIVATION, "drop1": DROPOUT, "norm": MAYBE_NORM, "fc2": LINEAR, "drop2": DROPOUT}
BLOCK: Mapping[str, tuple[str, ...] | None] = {
    "norm1": NORM,
    "drop_path1": DROP_PATH,
    "norm2": NORM,
    "mlp": ("Mlp", "GluMlp", "SwiGLU"),
    "drop_path2": DROP_PATH,
}
LAYER_SCALE = ("LayerScale", "Identity")

PARTS: dict[str, Parts] = {
    "VisionTransformer": Parts(MODEL, TOKENS),
    "VisionTransformerDistilled": Parts(MODEL, TOKENS),
    "Eva": Parts({**MODEL, "rope": ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3")}, TOKENS),
    "PatchEmbed": Parts({"proj": ("Conv2d",), "norm": MAYBE_NORM}),
    "Block": Parts({**BLOCK, "attn": ("Attention",), "ls1": LAYER_SCALE, "ls2": LAYER_SCALE}),
    "EvaBlock": Parts({**BLOCK, "attn": ("EvaAttention", "AttentionRope")}, frozenset({"gamma_1", "gamma_2"})),
    "Attention": Parts(ATTENTION),
    "AttentionRope": Parts(SPLIT_ATTENTION),
    "EvaAttention": Parts(SPLIT_ATTENTION, frozenset({"q_bias", "k_bias", "v_bias"})),
    "Mlp": Parts({**MLP, "fc1": LINEAR}),
    "GluMlp": Parts({**MLP, "fc1": LINEAR}),
    "SwiGLU": Parts({**MLP, "fc1_g": LINEAR, "fc1_x": LINEAR}),
    "LayerScale": Parts(tensors=frozenset({"gamma"})),
    "RotaryEmbeddingCat": Parts(tensors=frozenset({"bands", "pos_embed"})),
    "RotaryEmbeddingDinoV3": Parts(tensors=frozenset({"periods", "pos_embed_cached"})),
    **{**dict.fromkeys(NORM, LEAVES["LayerNorm"]), **LEAVES},
}
LISTS = {"VisionTransformer": ("Block",), "VisionTransformerDistilled": ("Block",), "Eva": ("EvaBlock",)}
TIMM = Catalogue(PARTS, LISTS, REASONS, models=tuple(LISTS))
