"""What may stand where in a timm model that runs on packed tokens. Everything else is refused by name: never another network in silence.

Classes are known by name, not imported: timm moves them between modules, and this package does not need timm. A subclass, a class of
somebody else's, an extra parameter, buffer or submodule, a hook or a replaced ``forward`` is not what the table describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

__all__ = ["check_parts", "class_name", "refused"]

LINEAR, DROPOUT, DROP_PATH = ("Linear",), ("Dropout",), ("DropPath", "Identity")
NORM = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "RMSNorm", "SimpleNorm", "SimpleNormFp32")
MAYBE_NORM = (*NORM, "Identity")
ACTIVATION = ("GELU", "GELUTanh", "QuickGELU", "ReLU", "SiLU", "Sigmoid", "Swish", "Tanh")  # of each element by itself
BLOCKS = ("Sequential", "ModuleList")
HEAD = None  # runs on the restored grid, by timm itself

WEIGHT_AND_BIAS = frozenset({"weight", "bias"})

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
    "VisionTransformerDistilled": "it has a distillation token and two heads",
    "VisionTransformerSAM": "attention stays within windows and adds relative positions",
}


@dataclass(frozen=True)
class Parts:
    """The submodules of a class, each with the classes it may have, and its own parameters and buffers."""

    children: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


TOKENS = frozenset({"cls_token", "reg_token", "pos_embed"})
MODEL: Mapping[str, tuple[str, ...] | None] = {
    "patch_embed": ("PatchEmbed",),
    "pos_drop": DROPOUT,
    "patch_drop": ("Identity",),
    "norm_pre": MAYBE_NORM,
    "blocks": BLOCKS,
    "norm": MAYBE_NORM,
    "attn_pool": HEAD,
    "fc_norm": HEAD,
    "head_drop": HEAD,
    "head": HEAD,
}
ATTENTION = {
    "qkv": LINEAR,
    "q_norm": MAYBE_NORM,
    "k_norm": MAYBE_NORM,
    "attn_drop": DROPOUT,
    "norm": MAYBE_NORM,
    "gate": LINEAR,
    "proj": LINEAR,
    "proj_drop": DROPOUT,
}
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
    "Linear": Parts(tensors=WEIGHT_AND_BIAS),
    "Conv2d": Parts(tensors=WEIGHT_AND_BIAS),
    **{name: Parts(tensors=WEIGHT_AND_BIAS) for name in NORM},
    **{name: Parts() for name in (*ACTIVATION, *BLOCKS, "Identity", "Dropout", "DropPath")},
}
LISTS = {"VisionTransformer": ("Block",), "Eva": ("EvaBlock",)}  # what ``blocks`` holds

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refused(path: str, name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(f"{path}: {name} does not run on packed tokens: {reason}")


def class_name(module: nn.Module) -> str:
    """The bare name of a class of timm's or PyTorch's; that of any other with its module, so that no table knows it."""
    kind = type(module)
    if kind.__module__.startswith(("timm.", "torch.nn.modules.")):
        return kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"


def check_parts(
    module: nn.Module, path: str = "vit", allowed: tuple[str, ...] = tuple(LISTS), items: tuple[str, ...] = ()
) -> None:
    """Refuse a timm model with any part, parameter or hook that the packed runner would pass over.

    ``items``: the classes that a list of blocks may hold. NotImplementedError names the part, its class, and why.
    """
    name = class_name(module)
    if name not in allowed:
        raise refused(path, name, REASONS.get(name, f"expected {' or '.join(allowed)}"))
    parts = PARTS[name]
    for key, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is not None and key not in parts.tensors:
            raise refused(f"{path}.{key}", name, "it is not expected to have this parameter or buffer")
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        raise refused(path, name, "it has hooks, and nothing calls it")
    if "forward" in vars(module):
        raise refused(path, name, "its forward was replaced, and nothing calls it")
    for key, child in module.named_children():
        where = f"{path}.{key}"
        kinds = items if name in BLOCKS else parts.children.get(key, ())
        if kinds == ():
            raise refused(where, class_name(child), f"{name} is not expected to have it")
        if kinds is not HEAD:
            check_parts(child, where, kinds, LISTS.get(name, ()))
