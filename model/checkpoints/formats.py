"""The public checkpoint formats as tables, and the model that is in such a file: sizes by shapes, the rest by its config or the caller.

Sources: timm's VisionTransformer, rstrudel/segmenter, tue-mps/cts-segmenter, tue-mps/algm-segmenter, and those of mmseg.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...checks import describe
from ..info import CheckpointInfo
from ..vit import PRESETS
from .files import CheckpointFile, as_tuple, mapping, read_yaml, refusal, shortened
from .mmseg import read_training

Config = dict[str, Any]

IMAGENET: Config = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NORMALIZATIONS = {"vit": {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "deit": IMAGENET}  # Segmenter's names
SIZES = {"d_model": "embed_dim", "n_layers": "depth", "patch_size": "patch_size", "n_cls": "num_classes"}  # Segmenter's
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
LAYERS = [  # of mmsegmentation's transformers
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."), (r"\.blocks\.", ".layers."), (r"\.norm(?P<n>\d)\.", r".ln\g<n>."),
    (r"\.attn\.qkv\.", ".attn.attn.in_proj_"), (r"\.attn\.proj\.", ".attn.attn.out_proj."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."), (r"\.mlp\.fc2\.", ".ffn.layers.1."),
]  # fmt: skip
MMSEG = Format(
    "mmsegmentation Segmenter",
    [r"backbone\.patch_embed\.projection\.weight"],
    [
        (r"^encoder\.vit\.norm\.", "backbone.ln1."), (r"^encoder\.vit\.", "backbone."),
        (r"^decoder\.head\.", "decode_head.conv_seg."), (r"^decoder\.proj_dec\.", "decode_head.dec_proj."),
        (r"^decoder\.proj_(patch|classes)$", r"decode_head.\1_proj.weight"), (r"^decoder\.", "decode_head."), *LAYERS,
    ],
    # Every head of mmsegmentation has a conv_seg; beside a mask transformer nothing reads it.
    r"auxiliary_head\..*|decode_head\.conv_seg\.(weight|bias)",
    # Linears, where Segmenter has bare parameters for x @ P, and a convolution for a linear head.
    {f"decoder.proj_{name}": lambda weight: weight.transpose(0, -1) for name in ("patch", "classes")}
    | {"decoder.head.weight": lambda weight: weight.flatten(1)},
    vit={"eps": 1e-6, "position_rule": "plain bicubic"},
)  # fmt: skip
DTOP = Format(
    "DToP",
    [*MMSEG.telling, r"decode_head\.input_proj\.weight"],
    [
        (r"^encoder\.vit\.", "backbone."),
        (r"^decoder\.head\.", "decode_head."),
        *((rf"^(?P<vit>backbone.*){pattern}", rf"\g<vit>{name}") for pattern, name in LAYERS),
    ],
    r"backbone\.ln1\.(weight|bias)|.*\.loss_decode\..*",  # the norm is behind the heads
    vit=MMSEG.vit | {"final_norm": False},
    otherwise="; blocks and thresholds of the exits are told by a training config in the file",
)
REFUSED = {  # tensors of models that nothing here runs; the first are BEiT's, relative positions', hybrids', CaiT's
    r".*(relative_position|rel_pos|lambda_q1|patch_embed\.backbone|blocks_token_only).*": "StepEncoder.from_timm does not run it either",
    r"decode_head\.decoder_1\..*": "SegViT's head sums the masks of several blocks, DToP's is the one that is known",
}


def public_recipe(file: CheckpointFile, given: Config) -> tuple[Format, Config, CheckpointInfo]:
    """How to read somebody else's file: by its keys, shapes and config, and what the caller says."""
    file.select(given.get("prefix"))
    kind = recognised(file)
    readers = {SEGMENTER.name: read_variant, CTS.name: read_variant, TIMM.name: fold_layer_scale}
    told = readers.get(kind.name, read_training)(file)
    for name in ("img_size", "num_heads", "quota"):
        if None not in (given[name], told.get(name)) and given[name] != told[name]:
            raise refusal(name, f"{told[name]}, as the config of {file.path} tells", given[name])
    hints = {name: told.get(name) if value is None else value for name, value in given.items()}
    quota = hints["quota"] if kind is CTS else given["quota"]
    if (kind is CTS) == (quota is None):
        wanted = f"the number of 2x2 blocks to share per image, which no variant.yml beside {file.path} tells"
        raise refusal("quota", wanted if kind is CTS else f"None, as {file.path} holds no CTS policy", quota)
    heads = {f"auxiliary_head.{i}.": block for i, (block, *_) in enumerate(told.get("exits", ()))}
    exits = [(rf"^encoder\.exits\.{block}\.(head\.)?", name) for name, block in heads.items()]
    kind = replace(kind, vit=kind.vit | told.get("vit", {}), renames=[*exits, *kind.renames])
    vit = vit_config(file, kind, hints)
    decoder = decoder_config(file, kind, told.get("decoder_heads") or vit["num_heads"])
    for name, ours in SIZES.items():
        if told.get(name) not in (None, value := ((decoder or {}) | vit).get(ours)):
            raise refusal(file.path, f"variant.yml to tell {name}={value}", repr(told[name]))
    config: Config = {"vit": vit, "resample": kind.resample, "policy": None, "decoder": decoder, "exits": {}}
    if quota is not None:
        config["policy"] = {"kind": "QuotaPolicy", "count": quota, "scorer": {"kind": "CTSPolicy"}}
    for block, num_heads, _ in told.get("exits", ()):
        sizes = atm_config(file, kind, f"encoder.exits.{block}", num_heads)
        config["exits"][block] = {"kind": "AtmExit", "keep_per_class": 5, **sizes}
    return kind, config, CheckpointInfo(kind.name, **told.get("info", {}))


def recognised(file: CheckpointFile) -> Format:
    """The file's format, by its keys."""
    for kind in (CTS, SEGMENTER, DTOP, MMSEG, TIMM):
        if all(any(re.fullmatch(pattern, key) for key in file.tensors) for pattern in kind.telling):
            break
    else:
        wanted = "a timm ViT, Segmenter, CTS-Segmenter, mmsegmentation Segmenter or DToP checkpoint, or a config beside save_checkpoint's"
        raise refusal(file.path, wanted, f"tensors {shortened(sorted(file.tensors))}")
    for pattern, why in REFUSED.items():
        if odd := [key for key in file.tensors if re.fullmatch(pattern, key)]:
            raise refusal(file.path, f"a {kind.name} that is supported", f"one with {shortened(odd)}: {why}")
    return kind


def read_variant(file: CheckpointFile) -> Config:
    """What the variant.yml beside a file of Segmenter's tells; as ``img_size``, ``num_heads`` and ``quota`` too. DeiT's two tokens are joined."""
    variant = read_yaml(file.path.with_name("variant.yml"))
    told, data, runs = (mapping(variant.get(f"{name}_kwargs")) for name in ("net", "dataset", "inference"))
    shares = any(key.startswith("policy_net.") for key in file.tensors)
    name, schedule = told.get("normalization"), told.get("policy_schedule") if shares else None
    if name not in (None, *NORMALIZATIONS):
        raise refusal(file.path, f"normalization in variant.yml to be {' or '.join(NORMALIZATIONS)}", describe(name))
    if (merged := data.get("patch_type", "pure")) != "pure":  # algm: merges inside the encoder
        raise refusal(file.path, "patch_type in variant.yml to be pure", f"{merged!r}, which is not supported")
    if schedule and (not isinstance(schedule, (list, tuple)) or len(schedule) < 2):
        raise refusal(file.path, "policy_schedule in variant.yml to be a pair of numbers", describe(schedule))
    size, quota = as_tuple(told.get("image_size")), schedule[1] if schedule else None
    if size is not None and not (isinstance(size, tuple) and [type(side) for side in size] == [int, int]):
        raise refusal("img_size", f"a pair (height, width) in the variant.yml of {file.path}", describe(size))
    cls, dist = (file.tensors.get(f"encoder.{name}_token") for name in ("cls", "dist"))
    if cls is not None and dist is not None and cls.dim() == 3 and cls.shape == dist.shape:
        file.tensors["encoder.cls_token"] = torch.cat((cls, file.tensors.pop("encoder.dist_token")), 1)
    names = {"window": "window_size", "stride": "window_stride"}
    info = {name: (runs[key],) * 2 for name, key in names.items() if key in runs} | NORMALIZATIONS.get(name or "", {})
    return told | {"img_size": size, "num_heads": told.get("n_heads"), "quota": quota, "info": info | {"enlarge": True}}


def fold_layer_scale(file: CheckpointFile) -> Config:
    """In place: LayerScale's factors (DINOv2) into the projections that they scale, whose dtype the products are rounded to."""
    tensors = file.tensors
    for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        projection = name.replace("ls1.gamma", "attn.proj.").replace("ls2.gamma", "mlp.fc2.")
        weight, bias = (tensors.get(projection + kind) for kind in ("weight", "bias"))
        if weight is not None and bias is not None and weight.shape[:1] == bias.shape == tensors[name].shape:
            gamma = tensors.pop(name)
            tensors[projection + "weight"] = (gamma[:, None].double() * weight).to(weight.dtype)
            tensors[projection + "bias"] = (gamma.double() * bias).to(bias.dtype)
    return {}


def vit_config(file: CheckpointFile, kind: Format, hints: Config) -> Config:
    """The ViT's config, its sizes from the tensors' shapes."""
    slots = shape_of(file, kind, "encoder.vit.cls_token", 3)[1]
    channels, patch, width = shape_of(file, kind, "encoder.vit.patch_embed.proj.weight", 4)[1:]
    if patch != width:
        raise refusal(file.path, "square patches", f"{patch} x {width}")
    hidden = shape_of(file, kind, "encoder.vit.blocks.0.mlp.fc1.weight", 2)[0]
    depth = count_blocks(file, kind, "encoder.vit")
    (length, dim), key = shape_of(file, kind, "encoder.vit.pos_embed", 3)[1:], kind.source("encoder.vit.pos_embed")
    side = math.isqrt(length)  # of length - slots too, where that is a square
    rows, cols = (pixels // patch for pixels in hints["img_size"] or (side * patch, side * patch))
    if rows * cols == length > 1 and slots:
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


def decoder_config(file: CheckpointFile, kind: Format, num_heads: int) -> Config | None:
    """A mask transformer where there are tensors of one, else a linear layer, in mmsegmentation as a convolution; DToP's head; None: timm."""
    if kind.name == TIMM.name:
        return None
    if kind.name == DTOP.name:
        return {"kind": "AtmDecoder", **atm_config(file, kind, "decoder", num_heads)}
    mmseg = kind.name == MMSEG.name
    if {kind.source(f"decoder.{name}") for name in ("cls_emb", "proj_dec.weight")}.isdisjoint(file.tensors):
        num_classes, dim = shape_of(file, kind, "decoder.head.weight", 4 if mmseg else 2)[:2]
        return {"kind": "LinearDecoder", "dim": dim, "num_classes": num_classes}
    num_classes, dim = shape_of(file, kind, "decoder.cls_emb", 3)[1:]
    heads = num_heads if mmseg else None  # Segmenter's has one per 64 channels
    sizes = {"dim": dim, "num_classes": num_classes, "depth": count_blocks(file, kind, "decoder"), "num_heads": heads}
    return {"kind": "MaskTransformerDecoder", **sizes}


def atm_config(file: CheckpointFile, kind: Format, name: str, num_heads: int) -> Config:
    """Sizes of one of DToP's heads."""
    width, dim = shape_of(file, kind, f"{name}.head.input_proj.weight", 2)
    num_classes = shape_of(file, kind, f"{name}.head.q.weight", 2)[0]
    depth = count_blocks(file, kind, f"{name}.head.decoder", "layers")
    return {"dim": dim, "num_classes": num_classes, "depth": depth, "num_heads": num_heads, "width": width}


def shape_of(file: CheckpointFile, kind: Format, name: str, rank: int) -> list[int]:
    """Shape of a tensor that must be there, by the model's name."""
    key = kind.source(name)
    if key not in file.tensors:
        raise ValueError(f"{file.path}: missing key: {key}{kind.otherwise}")
    shape = list(file.tensors[key].shape)
    if len(shape) != rank or 0 in shape[2:]:
        raise refusal(file.path, f"{key} to have {rank} dimensions, none empty", f"shape {shape}")
    return shape


def count_blocks(file: CheckpointFile, kind: Format, name: str, blocks: str = "blocks") -> int:
    """One more than the highest block number under ``name``."""
    pattern = re.compile(re.escape(kind.source(f"{name}.{blocks}.")) + r"(\d+)\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, file.tensors) if match), default=0)
