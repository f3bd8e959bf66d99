"""The public checkpoint formats as tables, and the model that is in such a file: sizes by shapes, the rest by its config or the caller.

Sources: timm's VisionTransformer, rstrudel/segmenter, tue-mps/cts-segmenter, and open-mmlab/mmsegmentation's
VisionTransformer and SegmenterMaskTransformerHead.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...checks import describe
from ..info import CheckpointInfo
from ..vit import PRESETS
from .files import CheckpointFile, as_tuple, mapping, read_yaml, refusal

Config = dict[str, Any]

IMAGENET: Config = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NORMALIZATIONS = {"vit": {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "deit": IMAGENET}  # Segmenter's names
ASSUMED = "class token on, GELU, eps 1e-6, bicubic positions, heads as asked or of 64 channels, RGB, pictures whole"
HEADS = {(size["embed_dim"], size["depth"]): size["num_heads"] for size in PRESETS.values()}


@dataclass(frozen=True)
class Format:
    """How a kind of file names the model's tensors, and what it never tells because its code has it so."""

    name: str
    telling: Sequence[str] = ()  # patterns by which it is recognised: each matches a name in the file
    renames: Sequence[tuple[str, str]] = ()  # patterns and replacements: from the model's name to the file's
    ignored: str = r"(?!)"  # matches the file's tensors that the model has no use for
    transforms: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)  # by the model's names
    vit: Config = field(default_factory=dict)  # the entries of the ViT's config that no tensor tells
    resample: str = "area"
    otherwise: str = ""  # what to do with a file whose tensors are others

    def source(self, name: str) -> str:
        """What the file calls the tensor ``name`` of the model."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name, count=1)
        return name


CLASSIFIER = r"head\.(weight|bias)|pre_logits\.fc\.(weight|bias)"  # the latter in old versions of timm
TIMM = Format(
    "timm ViT",
    [r"patch_embed\.proj\.weight", r"blocks\..*"],
    [(r"^(encoder\.)?vit\.", "")],
    CLASSIFIER,
    vit={"eps": 1e-6, "position_rule": "bicubic"},
    otherwise="; a ViT with other parts: create the model in timm, load the file into it and pass it to StepEncoder.from_timm",
)
SEGMENTER = Format(
    "Segmenter",
    [r"encoder\.patch_embed\.proj\.weight", r"decoder\..*"],
    [(r"^encoder\.vit\.", "encoder."), (r"^encoder\.policy\.scorer\.", "policy_net.")],
    rf"encoder\.({CLASSIFIER}|head_dist\.(weight|bias))",
    vit={"eps": 1e-5, "position_rule": "bilinear"},
)
CTS = replace(SEGMENTER, name="CTS-Segmenter", telling=[*SEGMENTER.telling, r"policy_net\..*"], resample="bilinear")
MMSEG = Format(
    "mmsegmentation Segmenter",
    [r"backbone\.patch_embed\.projection\.weight"],
    [
        (r"^encoder\.vit\.norm\.", "backbone.ln1."),
        (r"^encoder\.vit\.", "backbone."),
        (r"^decoder\.head\.", "decode_head.conv_seg."),
        (r"^decoder\.proj_dec\.", "decode_head.dec_proj."),
        (r"^decoder\.proj_(patch|classes)$", r"decode_head.\1_proj.weight"),
        (r"^decoder\.", "decode_head."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"\.blocks\.", ".layers."),
        (r"\.norm(\d)\.", r".ln\1."),
        (r"\.attn\.qkv\.", ".attn.attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.attn.out_proj."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    ],
    # Every head of mmsegmentation has a conv_seg; beside a mask transformer nothing reads it.
    r"auxiliary_head\..*|decode_head\.conv_seg\.(weight|bias)",
    # Linears, where Segmenter has bare parameters for x @ P, and a convolution for a linear head.
    {
        "decoder.proj_patch": lambda weight: weight.transpose(0, -1),
        "decoder.proj_classes": lambda weight: weight.transpose(0, -1),
        "decoder.head.weight": lambda weight: weight.flatten(1),
    },
    vit={"eps": 1e-6, "position_rule": "plain bicubic"},
)


REFUSED = {  # tensors of models that nothing here runs; the first are BEiT's, relative positions', hybrids', CaiT's
    r".*(relative_position|rel_pos|lambda_q1|patch_embed\.backbone|blocks_token_only).*": "StepEncoder.from_timm does not run it either",
    r"decode_head\.decoder_1\..*": "SegViT's head sums the masks of several blocks",
}


def public_recipe(file: CheckpointFile, given: Config) -> tuple[Format, Config, CheckpointInfo]:
    """How to read somebody else's file: by its keys, shapes and config, and what the caller says."""
    for kind in (CTS, SEGMENTER, MMSEG, TIMM):
        if all(any(re.fullmatch(pattern, key) for key in file.tensors) for pattern in kind.telling):
            break
    else:
        wanted = "a timm ViT, Segmenter, CTS-Segmenter or mmsegmentation Segmenter checkpoint"
        ours = "(or one of save_checkpoint with its config beside it)"
        raise refusal(file.path, f"{wanted} {ours}", f"tensors {shortened(sorted(file.tensors))}")
    for pattern, why in REFUSED.items():
        if odd := [key for key in file.tensors if re.fullmatch(pattern, key)]:
            raise refusal(file.path, f"a {kind.name} that is supported", f"one with {shortened(odd)}: {why}")
    variant = read_variant(file, kind) if kind in (SEGMENTER, CTS) else {}
    for name, value in given.items():
        if None not in (value, variant.get(name)) and value != variant[name]:
            raise refusal(name, f"{variant[name]}, as the config of {file.path} tells", value)
    hints = {name: variant.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name in ("num_heads", "img_size") if hints[name] is None]
    if kind is MMSEG and missing and not file.meta.keys().isdisjoint(("cfg", "config")):  # it may tell of other sizes
        wanted = f"the backbone's in the training config, a text in {file.path} that is not read"
        raise refusal(" and ".join(missing), wanted, None)
    if kind is CTS and hints["quota"] is None:
        wanted = f"the number of 2x2 blocks to share per image, which no variant.yml beside {file.path} tells"
        raise refusal("quota", wanted, None)
    if kind is not CTS and hints["quota"] is not None:
        raise refusal("quota", f"None, as {file.path} holds no CTS policy", hints["quota"])
    if kind is TIMM:
        fold_layer_scale(file.tensors)
    cls, dist = (file.tensors.get(f"encoder.{name}_token") for name in ("cls", "dist"))
    if cls is not None and dist is not None and cls.dim() == 3 and cls.shape == dist.shape:  # DeiT: a prefix of two
        file.tensors["encoder.cls_token"] = torch.cat((cls, file.tensors.pop("encoder.dist_token")), 1)
    if kind is MMSEG:
        weight = file.tensors["backbone.patch_embed.projection.weight"]  # without a bias in mmsegmentation >= 1.2
        file.tensors.setdefault("backbone.patch_embed.projection.bias", weight.new_zeros(len(weight)))
        warnings.warn(f"{file.path}: no tensor tells, so taken for granted: {ASSUMED}", stacklevel=4)
    vit = vit_config(file, kind, hints)
    decoder = None if kind is TIMM else decoder_config(file, kind, vit["num_heads"])
    sizes = {"d_model": vit["embed_dim"], "n_layers": vit["depth"], "patch_size": vit["patch_size"]}
    for name, value in (sizes | {"n_cls": decoder and decoder["num_classes"]}).items():
        if variant.get(name) not in (None, value):
            raise refusal(file.path, f"variant.yml to tell {name}={value}", repr(variant[name]))
    config: Config = {"vit": vit, "resample": kind.resample, "policy": None, "exits": {}, "decoder": decoder}
    if kind is CTS:
        config["policy"] = {"kind": "QuotaPolicy", "count": hints["quota"], "scorer": {"kind": "CTSPolicy"}}
    told = (
        {"stretch": True, **dataset(file.meta)}
        if kind is MMSEG
        else NORMALIZATIONS.get(variant.get("normalization", ""), {})
    )
    return kind, config, CheckpointInfo(kind.name, **told | variant.get("runs", {}))


def read_variant(file: CheckpointFile, kind: Format) -> Config:
    """What the variant.yml beside a file of Segmenter's tells of the network; as ``img_size``, ``num_heads`` and ``quota`` too."""
    variant = read_yaml(file.path.with_name("variant.yml"))
    told, data, runs = (mapping(variant.get(f"{name}_kwargs")) for name in ("net", "dataset", "inference"))
    if (merged := data.get("patch_type", "pure")) != "pure":  # algm: merges inside the encoder
        raise refusal(file.path, "patch_type in variant.yml to be pure", f"{merged!r}, which is not supported")
    name, schedule = told.get("normalization"), told.get("policy_schedule") if kind is CTS else None
    if name not in (None, *NORMALIZATIONS):
        raise refusal(file.path, f"normalization in variant.yml to be {' or '.join(NORMALIZATIONS)}", describe(name))
    if schedule and (not isinstance(schedule, (list, tuple)) or len(schedule) < 2):
        raise refusal(file.path, "policy_schedule in variant.yml to be a pair of numbers", describe(schedule))
    size, quota = as_tuple(told.get("image_size")), schedule[1] if schedule else None
    if size is not None and not (isinstance(size, tuple) and [type(side) for side in size] == [int, int]):
        raise refusal("img_size", f"a pair (height, width) in the variant.yml of {file.path}", describe(size))
    names = {"window": "window_size", "stride": "window_stride"}
    told |= {"runs": {"enlarge": True} | {name: (runs[key],) * 2 for name, key in names.items() if key in runs}}
    return told | {"img_size": size, "num_heads": told.get("n_heads"), "quota": quota}


def fold_layer_scale(tensors: dict[str, Tensor]) -> None:
    """In place: LayerScale's factors (DINOv2) into the projections that they scale, whose dtype the products are rounded to."""
    for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        projection = name.replace("ls1.gamma", "attn.proj.").replace("ls2.gamma", "mlp.fc2.")
        weight, bias = (tensors.get(projection + kind) for kind in ("weight", "bias"))
        if weight is not None and bias is not None and weight.shape[:1] == bias.shape == tensors[name].shape:
            gamma = tensors.pop(name)
            tensors[projection + "weight"] = (gamma[:, None].double() * weight).to(weight.dtype)
            tensors[projection + "bias"] = (gamma.double() * bias).to(bias.dtype)


def dataset(meta: Config) -> Config:
    """Names and colours of the classes, as mmengine or the older mmcv keep them; nothing where the file does not tell."""
    told = mapping(meta.get("dataset_meta")) or {name.lower(): meta.get(name) for name in ("CLASSES", "PALETTE")}
    found = [(name, kind, as_tuple(told.get(name))) for name, kind in (("classes", str), ("palette", tuple))]
    return {name: value for name, kind, value in found if isinstance(value, tuple) and set(map(type, value)) <= {kind}}


def vit_config(file: CheckpointFile, kind: Format, hints: Config) -> Config:
    """The ViT's config, its sizes from the tensors' shapes."""
    slots, dim = shape_of(file, kind, "encoder.vit.cls_token", 3)[1:]
    channels, patch, width = shape_of(file, kind, "encoder.vit.patch_embed.proj.weight", 4)[1:]
    if patch != width:
        raise refusal(file.path, "square patches", f"{patch} x {width}")
    hidden = shape_of(file, kind, "encoder.vit.blocks.0.mlp.fc1.weight", 2)[0]
    depth = count_blocks(file, kind, "encoder.vit")
    length, key = shape_of(file, kind, "encoder.vit.pos_embed", 3)[1], kind.source("encoder.vit.pos_embed")
    side = math.isqrt(length)  # of length - slots too, where that is a square
    rows, cols = (pixels // patch for pixels in hints["img_size"] or (side * patch, side * patch))
    if rows * cols == length > 1:
        found = f"{length} positions, as many as there are patches{kind.otherwise}"
        raise refusal(file.path, f"{key} with a slot for the class token", found)
    if rows * cols != length - slots:
        wanted = f"(height, width) in pixels of {length - slots} patches of {patch} x {patch}, the positions that {file.path} has"
        raise refusal("img_size", wanted, f"{hints['img_size']}{kind.otherwise}")
    num_heads = HEADS.get((dim, depth)) if hints["num_heads"] is None else hints["num_heads"]
    if num_heads is None:
        size = f"width {dim}, depth {depth} is no standard size"
        raise refusal("num_heads", f"the number of attention heads, which {file.path} does not tell ({size})", None)
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": num_heads, "num_prefix": slots}
    sizes |= {"patch_size": patch, "in_chans": channels}
    ratio = hidden / dim if int(hidden / dim * dim) == hidden else (hidden + 0.5) / dim
    return {"kind": "ViT", "img_size": (rows * patch, cols * patch), "mlp_ratio": ratio} | sizes | kind.vit


def decoder_config(file: CheckpointFile, kind: Format, num_heads: int) -> Config:
    """A mask transformer where there are tensors of one, else a linear layer, in mmsegmentation as a convolution."""
    if {kind.source(f"decoder.{name}") for name in ("cls_emb", "proj_dec.weight")}.isdisjoint(file.tensors):
        num_classes, dim = shape_of(file, kind, "decoder.head.weight", 4 if kind is MMSEG else 2)[:2]
        return {"kind": "LinearDecoder", "dim": dim, "num_classes": num_classes}
    num_classes, dim = shape_of(file, kind, "decoder.cls_emb", 3)[1:]
    heads = num_heads if kind is MMSEG else None  # Segmenter's has one per 64 channels
    sizes = {"dim": dim, "num_classes": num_classes, "depth": count_blocks(file, kind, "decoder"), "num_heads": heads}
    return {"kind": "MaskTransformerDecoder", **sizes}


def shape_of(file: CheckpointFile, kind: Format, name: str, rank: int) -> list[int]:
    """Shape of a tensor that must be there, by the model's name."""
    key = kind.source(name)
    if key not in file.tensors:
        raise ValueError(f"{file.path}: missing key: {key}{kind.otherwise}")
    shape = list(file.tensors[key].shape)
    if len(shape) != rank or 0 in shape:
        raise refusal(file.path, f"{key} to have {rank} dimensions, none empty", f"shape {shape}")
    return shape


def count_blocks(file: CheckpointFile, kind: Format, name: str) -> int:
    """One more than the highest block number under ``name``."""
    pattern = re.compile(re.escape(kind.source(f"{name}.blocks.")) + r"(\d+)\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, file.tensors) if match), default=0)


def shortened(names: list[str]) -> str:
    """Names in a message, the first ones of a long list."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
