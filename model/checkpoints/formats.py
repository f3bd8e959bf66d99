"""The public checkpoint formats as tables: what each calls the model's tensors, and what it holds that is of no use.

Sources: timm's VisionTransformer, rstrudel/segmenter, tue-mps/cts-segmenter, and open-mmlab/mmsegmentation's
VisionTransformer and SegmenterMaskTransformerHead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..vit import PRESETS, ViT, interpolate
from .files import CheckpointFile

__all__ = ["MMSEG", "OURS", "SEGMENTER", "TIMM", "Config", "Format", "MmsegViT", "Shapes"]

Config = dict[str, Any]


class MmsegViT(ViT):
    """`ViT` whose positions are resized by plain bicubic interpolation, without timm's antialiasing.

    PyTorch's two bicubic filters have different coefficients (-0.75 and, with antialiasing, -0.5), so they differ also where
    the grid grows. Applies to the position rule ``"bicubic"``.

    Source: mmsegmentation, ``VisionTransformer.resize_pos_embed``.
    """

    def grid_positions(self, grid: tuple[int, int]) -> Tensor:
        config, positions = self.config, self.pos_embed[0, self.num_prefix :]
        if config.position_rule != "bicubic":
            return super().grid_positions(grid)
        return interpolate(positions, config.grid, grid, "bicubic", antialias=False)


@dataclass(frozen=True)
class Format:
    """How a kind of file names the model's tensors, and what it never tells because its code has it so."""

    name: str
    telling: Sequence[str] = ()  # patterns by which it is recognised: each matches a name in the file
    renames: Sequence[tuple[str, str]] = ()  # patterns and replacements: from the model's name to the file's
    ignored: str = r"(?!)"  # matches the file's tensors that the model has no use for
    transforms: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)  # by the model's names
    vit: Config = field(default_factory=dict)  # the entries of the ViT's config that no tensor tells
    keeps_dtypes: bool = False  # each tensor keeps its dtype; else all get the widest of them
    otherwise: str = ""  # what to do with a file whose tensors are others

    def source(self, name: str) -> str:
        """What the file calls the tensor ``name`` of the model."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name, count=1)
        return name


# With the layer that old versions of timm have before it.
CLASSIFIER = r"head\.(weight|bias)|pre_logits\.fc\.(weight|bias)"
OURS = Format("step-kernels", keeps_dtypes=True)
TIMM = Format(
    "timm ViT",
    [r"patch_embed\.proj\.weight", r"blocks\..*"],
    [(r"^(encoder\.)?vit\.", "")],
    CLASSIFIER,
    vit={"kind": "ViT", "eps": 1e-6, "position_rule": "bicubic"},
    otherwise="; a ViT with other parts: create the model in timm, load the file into it and pass it to StepEncoder.from_timm",
)
SEGMENTER = Format(
    "Segmenter",
    [r"encoder\.patch_embed\.proj\.weight", r"decoder\..*"],
    [(r"^encoder\.vit\.", "encoder."), (r"^encoder\.policy\.scorer\.", "policy_net.")],
    rf"encoder\.({CLASSIFIER})",
    vit={"kind": "ViT", "eps": 1e-5, "position_rule": "bilinear"},
)
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
    vit={"kind": "MmsegViT", "eps": 1e-6, "position_rule": "bicubic"},
)


@dataclass(frozen=True)
class Shapes:
    """A file's shapes by the model's names, and the sizes that they tell."""

    file: CheckpointFile
    kind: Format

    def of(self, name: str, rank: int) -> list[int]:
        """Shape of one tensor that must be there."""
        path, key = self.file.path, self.kind.source(name)
        if key not in self.file.tensors:
            raise ValueError(f"{path}: missing key: {key}{self.kind.otherwise}")
        shape = list(self.file.tensors[key].shape)
        if len(shape) != rank or 0 in shape:
            raise ValueError(f"{path}: expected {key} to have {rank} dimensions, none empty, got shape {shape}")
        return shape

    def blocks(self, name: str) -> int:
        """One more than the highest block number under ``name``."""
        pattern = re.compile(re.escape(self.kind.source(f"{name}.blocks.")) + r"(\d+)\.")
        return max((int(match[1]) + 1 for match in map(pattern.match, self.file.tensors) if match), default=0)

    def vit(self, img_size: tuple[int, int] | None, num_heads: int | None) -> Config:
        """The ViT's config, its sizes from the tensors' shapes."""
        path = self.file.path
        dim = self.of("encoder.vit.cls_token", 3)[2]
        channels, patch_size, width = self.of("encoder.vit.patch_embed.proj.weight", 4)[1:]
        if patch_size != width:
            raise ValueError(f"{path}: expected square patches, got {patch_size} x {width}")
        hidden = self.of("encoder.vit.blocks.0.mlp.fc1.weight", 2)[0]
        depth = self.blocks("encoder.vit")
        rows, cols = self.stored_grid(patch_size, img_size)
        standard = {(size["embed_dim"], size["depth"]): size["num_heads"] for size in PRESETS.values()}
        num_heads = num_heads or standard.get((dim, depth))
        if num_heads is None:
            raise ValueError(
                f"num_heads: expected the number of attention heads, which {path} does not tell (width {dim}, depth {depth} "
                "is no standard size), got None"
            )
        return self.kind.vit | {
            "embed_dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "img_size": (rows * patch_size, cols * patch_size),
            "patch_size": patch_size,
            "in_chans": channels,
            "mlp_ratio": hidden / dim if int(hidden / dim * dim) == hidden else (hidden + 0.5) / dim,
        }

    def decoder(self, num_heads: int | None) -> Config:
        """A mask transformer where there are tensors of one, else a linear layer, in mmsegmentation as a convolution."""
        kind = self.kind
        if {kind.source(f"decoder.{name}") for name in ("cls_emb", "proj_dec.weight")}.isdisjoint(self.file.tensors):
            num_classes, dim = self.of("decoder.head.weight", 4 if kind is MMSEG else 2)[:2]
            return {"kind": "LinearDecoder", "dim": dim, "num_classes": num_classes}
        num_classes, dim = self.of("decoder.cls_emb", 3)[1:]
        sizes = {"dim": dim, "num_classes": num_classes, "depth": self.blocks("decoder"), "num_heads": num_heads}
        return {"kind": "MaskTransformerDecoder", **sizes}

    def stored_grid(self, patch_size: int, img_size: tuple[int, int] | None) -> tuple[int, int]:
        """The patch grid that the position embeddings are for: that of ``img_size`` (height, width), or a square."""
        path, key = self.file.path, self.kind.source("encoder.vit.pos_embed")
        length = self.of("encoder.vit.pos_embed", 3)[1]
        side = math.isqrt(length)  # of length - 1 too, where that is a square
        rows, cols = (side, side) if img_size is None else (img_size[0] // patch_size, img_size[1] // patch_size)
        if rows * cols == length > 1:
            raise ValueError(
                f"{path}: expected {key} with a slot for the class token, got {length} positions, as many as there are patches"
                + self.kind.otherwise
            )
        if rows * cols != length - 1:
            raise ValueError(
                f"img_size: expected (height, width) in pixels of {length - 1} patches of {patch_size} x {patch_size}, the "
                f"positions that {path} has, got {img_size}{self.kind.otherwise}"
            )
        return rows, cols
