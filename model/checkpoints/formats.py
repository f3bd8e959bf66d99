"""The public checkpoint formats: how each is recognised, which model it describes, and what its tensors are called.

Sources: timm's VisionTransformer, rstrudel/segmenter, tue-mps/cts-segmenter; mmsegmentation's is in checkpoint_mmseg.py.
"""

from __future__ import annotations

import re
from typing import Any

from ...checks import describe
from .files import CheckpointFile, read_yaml
from .mmseg import mmseg_recipe
from .sizes import (
    CheckpointInfo,
    Hints,
    Names,
    Recipe,
    agreed,
    linear_decoder,
    mapping,
    mask_transformer,
    model_of,
    refuse_quota,
    shortened,
    vit_config,
)

__all__ = ["recipe_of"]

NORMALIZATIONS: dict[str, dict[str, Any]] = {  # Segmenter's names
    "vit": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "deit": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}
# With the layer that old versions of timm have before it.
CLASSIFIER = r"head\.(weight|bias)|pre_logits\.fc\.(weight|bias)"

# Parts of timm's ViTs that the plain one has not, by their keys.
UNSUPPORTED = (
    (r"(reg_token|register_tokens)$", "register tokens"),
    (r"(dist_token$|head_dist\.)", "a distillation token"),
    (r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])$", "LayerScale"),
    (r"\.attn\.[qk]_norm\.", "norms of queries and keys"),
    (r"\.attn\.([qv]_bias$|[qkv]_proj\.)", "separate projections of q, k and v"),
    (r"(^|\.)rope\.", "rotary positions"),
    (r"(rel_pos|relative_position)", "relative positions"),
    (r"^norm_pre\.", "a norm before the blocks"),
    (r"^fc_norm\.", "a norm after pooling in place of the final one"),
    (r"^attn_pool\.", "attention pooling"),
    (r"\.(attn|mlp)\.(norm|gate)\.", "norms or gates inside attention or MLP"),
    (r"\.mlp\.(fc1_[gx]|w\d+)\.", "a gated MLP"),
    (r"^patch_embed\.(norm|backbone)\.", "another patch embedding"),
)
# And parts that every plain ViT has.
REQUIRED = (
    (r"cls_token", "no class token"),
    (r"pos_embed", "no stored position embeddings"),
    (r"patch_embed\.proj\.bias", "a patch embedding without bias"),
    (r"blocks\.\d+\.attn\.qkv\.bias", "qkv without bias"),
    (r"blocks\.\d+\.norm1\.bias", "norms without bias"),
)


def recipe_of(file: CheckpointFile, hints: Hints) -> Recipe:
    """Recognise the format by its keys.

    Raises:
        ValueError: no known format, or a size that neither the file nor ``hints`` tell, or on which they contradict.
        NotImplementedError: a ViT with parts that the plain one has not.
    """
    keys = file.tensors.keys()
    if "encoder.patch_embed.proj.weight" in keys and any(key.startswith("decoder.") for key in keys):
        return segmenter_recipe(file, hints)
    if "backbone.patch_embed.projection.weight" in keys:
        return mmseg_recipe(file, hints)
    if "patch_embed.proj.weight" in keys and any(key.startswith("blocks.") for key in keys):
        return timm_recipe(file, hints)
    raise ValueError(
        f"{file.path}: expected a timm ViT, Segmenter, CTS-Segmenter or mmsegmentation Segmenter checkpoint (or one of "
        f"save_checkpoint with its config beside it), got tensors {shortened(sorted(keys))}"
    )


def timm_recipe(file: CheckpointFile, hints: Hints) -> Recipe:
    info = CheckpointInfo("timm ViT")
    refuse_unsupported(file, info.format)
    refuse_quota(file, hints)
    vit = vit_config(file, Names(), hints, eps=1e-6, position_rule="bicubic")
    return Recipe(info, model_of(vit), ((r"^vit\.", ""),), ignored=CLASSIFIER)


def segmenter_recipe(file: CheckpointFile, hints: Hints) -> Recipe:
    """Segmenter and CTS-Segmenter: every LayerNorm has torch's eps; decoders have one attention head per 64 channels."""
    variant = mapping(read_yaml(file.path.with_name("variant.yml")).get("net_kwargs"))
    shares = any(key.startswith("policy_net.") for key in file.tensors)
    normalization = told_normalization(file, variant.get("normalization"))
    info = CheckpointInfo("CTS-Segmenter" if shares else "Segmenter", **normalization)
    refuse_unsupported(file, info.format, "encoder.")
    size = variant.get("image_size")
    known = Hints(
        img_size=agreed(file, "img_size", (size, size) if isinstance(size, int) else size, hints.img_size),
        num_heads=agreed(file, "num_heads", variant.get("n_heads"), hints.num_heads),
    )
    vit = vit_config(file, Names("encoder."), known, eps=1e-5, position_rule="bilinear")
    if "decoder.head.weight" in file.tensors:
        decoder = linear_decoder(file, "decoder.head.weight", 2)
    else:
        decoder = mask_transformer(file, "decoder.", "blocks", max(1, vit["embed_dim"] // 64))
    found = (vit["embed_dim"], vit["depth"], vit["patch_size"], decoder["num_classes"])
    for name, size in zip(("d_model", "n_layers", "patch_size", "n_cls"), found, strict=True):
        agreed(file, name, variant.get(name), size)
    config = model_of(vit, decoder)
    if shares:
        count = agreed(file, "quota", told_quota(file, variant.get("policy_schedule")), hints.quota)
        if count is None:
            raise ValueError(
                f"quota: expected the number of 2x2 blocks to share per image, which no variant.yml beside {file.path} "
                "tells, got None"
            )
        config["policy"] = {"kind": "QuotaPolicy", "count": count, "scorer": {"kind": "CTSPolicy"}}
        config["resample"] = "bilinear"
    else:
        refuse_quota(file, hints)
    renames = ((r"^encoder\.vit\.", "encoder."), (r"^encoder\.policy\.scorer\.", "policy_net."))
    return Recipe(info, config, renames, ignored=rf"encoder\.({CLASSIFIER})")


def told_normalization(file: CheckpointFile, name: object) -> dict[str, Any]:
    """Mean and standard deviation by Segmenter's name for them; nothing where variant.yml has none."""
    if name is None:
        return {}
    if not isinstance(name, str) or name not in NORMALIZATIONS:
        raise ValueError(
            f"{file.path}: expected normalization in variant.yml to be {' or '.join(NORMALIZATIONS)}, got {describe(name)}"
        )
    return NORMALIZATIONS[name]


def told_quota(file: CheckpointFile, schedule: object) -> object:
    """The second entry of CTS-Segmenter's schedule: 2x2 blocks to share."""
    if not schedule:
        return None
    if not isinstance(schedule, (list, tuple)) or len(schedule) < 2:
        raise ValueError(
            f"{file.path}: expected policy_schedule in variant.yml to be a pair of numbers, got {describe(schedule)}"
        )
    return schedule[1]


def refuse_unsupported(file: CheckpointFile, name: str, prefix: str = "") -> None:
    """Refuse a ViT whose keys under ``prefix`` show parts that the plain one has not."""
    keys = [key.removeprefix(prefix) for key in file.tensors if key.startswith(prefix)]
    parts, witnesses = [], []
    for pattern, part in UNSUPPORTED:
        matching = [key for key in keys if re.search(pattern, key)]
        if matching:
            parts.append(part)
            witnesses.append(prefix + matching[0] + (f" and {len(matching) - 1} more" if len(matching) > 1 else ""))
    parts += [part for pattern, part in REQUIRED if not any(re.fullmatch(pattern, key) for key in keys)]
    if parts:
        raise NotImplementedError(
            f"{file.path}: expected a {name} with the parts of the plain ViT, got one with {', '.join(parts)}"
            f" (keys {', '.join(witnesses) or 'that are missing'}); create the model in timm, load the file into it and pass "
            "it to StepEncoder.from_timm"
        )
