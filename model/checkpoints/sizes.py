"""What a checkpoint's tensors tell about its model, in any format: sizes, positions, decoders."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...checks import check_grid, check_int
from ..vit import PRESETS
from .files import CheckpointFile

__all__ = [
    "CheckpointInfo",
    "Config",
    "Hints",
    "Names",
    "Recipe",
    "agreed",
    "linear_decoder",
    "mapping",
    "mask_transformer",
    "model_of",
    "refuse_quota",
    "shortened",
    "sized",
    "vit_config",
]

Config = dict[str, Any]


@dataclass(frozen=True)
class Hints:
    """What the caller says where the file is silent; None: nothing."""

    img_size: tuple[int, int] | None = None
    num_heads: int | None = None
    quota: int | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint tells beside the model.

    Attributes:
        format: the format's name.
        ignored: tensors of the file that the model has no use for, by the file's names.
        mean, std: per channel (RGB), of images in [0, 1]; None where the file does not tell.
        classes: names of the classes; None where the file does not tell.
        palette: one (red, green, blue) in 0..255 per class; None where the file does not tell.
    """

    format: str
    ignored: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """How to turn a file into a model.

    Attributes:
        info: the format's name and what else there is to tell; its ``ignored`` is not filled in yet.
        config: of the model, as `build_model` takes it.
        renames: patterns and replacements that make the file's name of a name in the model's state dict, one after the other.
        transforms: by the model's name, what to do with the file's tensor.
        ignored: matches the file's tensors that the model has no use for.
        keeps_dtypes: each tensor keeps its dtype; else all get the widest of them.
    """

    info: CheckpointInfo
    config: Config
    renames: Sequence[tuple[str, str]]
    transforms: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    ignored: str = r"(?!)"
    keeps_dtypes: bool = False

    def source(self, name: str) -> str:
        """What the file calls the tensor ``name`` of the model."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name, count=1)
        return name


@dataclass(frozen=True)
class Names:
    """What a format calls the parts that tell a ViT's sizes."""

    prefix: str = ""
    patches: str = "patch_embed.proj"
    blocks: str = "blocks"
    hidden: str = "mlp.fc1"


def vit_config(file: CheckpointFile, names: Names, hints: Hints, *, eps: float, position_rule: str) -> Config:
    """Sizes of the ViT, from its tensors' shapes."""
    dim = sized(file, f"{names.prefix}cls_token", 3)[2]
    channels, patch_size, width = sized(file, f"{names.prefix}{names.patches}.weight", 4)[1:]
    if patch_size != width:
        raise ValueError(f"{file.path}: expected square patches, got {patch_size} x {width}")
    hidden = sized(file, f"{names.prefix}{names.blocks}.0.{names.hidden}.weight", 2)[0]
    depth = count_blocks(file, f"{names.prefix}{names.blocks}")
    ratio = hidden / dim if int(hidden / dim * dim) == hidden else (hidden + 0.5) / dim
    rows, cols = stored_grid(file, f"{names.prefix}pos_embed", patch_size, hints.img_size)
    return {
        "kind": "ViT",
        "embed_dim": dim,
        "depth": depth,
        "num_heads": attention_heads(file, dim, depth, hints.num_heads),
        "img_size": (rows * patch_size, cols * patch_size),
        "patch_size": patch_size,
        "in_chans": channels,
        "mlp_ratio": ratio,
        "eps": eps,
        "position_rule": position_rule,
    }


def stored_grid(file: CheckpointFile, key: str, patch_size: int, img_size: tuple[int, int] | None) -> tuple[int, int]:
    """The patch grid that the position embeddings are for: that of ``img_size`` (height, width), or a square."""
    length = sized(file, key, 3)[1]
    no_slot = (
        f"{file.path}: expected {key} with a slot for the class token, got {length} positions, as many as there are patches; "
        "create the model in timm, load the file into it and pass it to StepEncoder.from_timm"
    )
    if img_size is None:
        side = math.isqrt(length - 1)
        if math.isqrt(length) ** 2 == length > 1:
            raise NotImplementedError(no_slot)
        if side * side != length - 1:
            raise ValueError(
                f"img_size: expected (height, width) in pixels, as {file.path} has {length - 1} positions of patches, "
                "which are no square, got None"
            )
        return side, side
    height, width = check_grid("img_size", img_size)
    rows, cols = height // patch_size, width // patch_size
    if rows * cols == length:
        raise NotImplementedError(no_slot)
    if rows * cols != length - 1:
        raise ValueError(
            f"img_size: expected one of {length - 1} patches of {patch_size} pixels, the positions in {file.path}, "
            f"got {height} x {width}, which has {rows * cols}"
        )
    return rows, cols


def attention_heads(file: CheckpointFile, dim: int, depth: int, num_heads: int | None) -> int:
    """The number of heads, which no tensor tells; known for the standard sizes only."""
    if num_heads is not None:
        return check_int("num_heads", num_heads, minimum=1)
    for preset in PRESETS.values():
        if (dim, depth) == (preset["embed_dim"], preset["depth"]):
            return preset["num_heads"]
    raise ValueError(
        f"num_heads: expected the number of attention heads, which {file.path} does not tell (width {dim}, depth {depth} "
        "is no standard size), got None"
    )


def linear_decoder(file: CheckpointFile, key: str, rank: int) -> Config:
    """The linear decoder whose weight is ``key``, [num_classes, dim] with ``rank - 2`` further dimensions."""
    num_classes, dim = sized(file, key, rank)[:2]
    return {"kind": "LinearDecoder", "dim": dim, "num_classes": num_classes}


def mask_transformer(file: CheckpointFile, prefix: str, blocks: str, num_heads: int) -> Config:
    num_classes, dim = sized(file, f"{prefix}cls_emb", 3)[1:]
    depth = count_blocks(file, prefix + blocks)
    sizes = {"dim": dim, "num_classes": num_classes, "depth": depth, "num_heads": num_heads}
    return {"kind": "MaskTransformerDecoder", **sizes}


def model_of(
    vit: Config, decoder: Config | None = None, policy: Config | None = None, resample: str = "area"
) -> Config:
    return {"vit": vit, "resample": resample, "policy": policy, "exits": {}, "decoder": decoder}


def count_blocks(file: CheckpointFile, prefix: str) -> int:
    """One more than the highest block number under ``prefix``."""
    numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in file.tensors]
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def sized(file: CheckpointFile, key: str, rank: int) -> list[int]:
    """Shape of one tensor that must be there."""
    if key not in file.tensors:
        raise ValueError(f"{file.path}: missing key: {key}")
    shape = list(file.tensors[key].shape)
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{file.path}: expected {key} to have {rank} dimensions, none empty, got shape {shape}")
    return shape


def agreed(file: CheckpointFile, name: str, told: Any, wanted: Any) -> Any:
    """What the file's config tells, or the caller or the tensors; ValueError where both do and differ."""
    told, wanted = (tuple(value) if isinstance(value, list) else value for value in (told, wanted))
    if told is not None and wanted is not None and told != wanted:
        raise ValueError(f"{name}: expected {told}, as the config of {file.path} tells, got {wanted}")
    return wanted if told is None else told


def mapping(value: object) -> Config:
    """``value`` if it is a dict; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def refuse_quota(file: CheckpointFile, hints: Hints) -> None:
    if hints.quota is not None:
        raise ValueError(f"quota: expected None, as {file.path} holds no CTS policy, got {hints.quota}")


def shortened(names: list[str], limit: int = 20) -> str:
    """Names in a message, the first ones of a long list."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
