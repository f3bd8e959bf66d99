"""mmsegmentation's Segmenter checkpoints: other names, transposed projections, and the training config as Python text.

Source: open-mmlab/mmsegmentation, ``VisionTransformer`` and ``SegmenterMaskTransformerHead``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from .files import CheckpointFile
from .sizes import (
    CheckpointInfo,
    Config,
    Hints,
    Names,
    Recipe,
    agreed,
    linear_decoder,
    mapping,
    mask_transformer,
    model_of,
    refuse_quota,
    vit_config,
)

__all__ = ["mmseg_recipe"]

RENAMES = (
    (r"^encoder\.vit\.norm\.", "backbone.ln1."),
    (r"^encoder\.vit\.", "backbone."),
    (r"^decoder\.head\.", "decode_head.conv_seg."),
    (r"^decoder\.proj_dec\.", "decode_head.dec_proj."),
    (r"^decoder\.proj_patch$", "decode_head.patch_proj.weight"),
    (r"^decoder\.proj_classes$", "decode_head.classes_proj.weight"),
    (r"^decoder\.", "decode_head."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.blocks\.", ".layers."),
    (r"\.norm(\d)\.", r".ln\1."),
    (r"\.attn\.qkv\.", ".attn.attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.attn.out_proj."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)
# What this package's ViT and decoders compute, by the config's names; a config that says otherwise is refused.
EXPECTED = {
    "backbone": {"type": "VisionTransformer", "act_cfg": {"type": "GELU"}, "with_cls_token": True, "num_fcs": 2},
    "decode_head": {"act_cfg": {"type": "GELU"}, "num_fcs": 2, "align_corners": False},
}


def mmseg_recipe(file: CheckpointFile, hints: Hints) -> Recipe:
    """Without a readable config in the file, the values of mmsegmentation's own Segmenter configs hold."""
    refuse_quota(file, hints)
    config = training_config(file)
    model = mapping(config.get("model"))
    backbone, head = mapping(model.get("backbone")), mapping(model.get("decode_head"))
    masks = not {"decode_head.cls_emb", "decode_head.dec_proj.weight"}.isdisjoint(file.tensors)
    refuse_otherwise(file, "backbone", backbone)
    refuse_other_norms(file, "backbone", backbone)
    # The linear head's activation belongs to convolutions that it does not have.
    refuse_otherwise(file, "decode_head", head if masks else {"align_corners": head.get("align_corners", False)})
    size = backbone.get("img_size")
    known = Hints(
        img_size=agreed(file, "img_size", (size, size) if isinstance(size, int) else size, hints.img_size),
        num_heads=agreed(file, "num_heads", backbone.get("num_heads"), hints.num_heads),
    )
    names = Names("backbone.", "patch_embed.projection", "layers", "ffn.layers.0.0")
    eps = norm_eps(backbone, 1e-6)
    vit = vit_config(file, names, known, eps=eps, position_rule=backbone.get("interpolate_mode", "bicubic"))
    vit["kind"] = "MmsegViT"
    refuse_other_outputs(file, backbone, head, vit["depth"])
    transforms: dict[str, Callable[[Tensor], Tensor]] = {}
    ignored = r"auxiliary_head\..*"
    if masks:
        refuse_other_norms(file, "decode_head", head)
        if norm_eps(head, 1e-5) != 1e-5:
            raise NotImplementedError(f"{file.path}: expected a decode_head with eps 1e-5, got {head['norm_cfg']}")
        decoder = mask_transformer(file, "decode_head.", "layers", head.get("num_heads") or vit["num_heads"])
        # Linears, where Segmenter has bare parameters for x @ P.
        transforms = {f"decoder.{name}": transposed for name in ("proj_patch", "proj_classes")}
        # Made for every head of mmsegmentation, not used by this one.
        ignored += r"|decode_head\.conv_seg\.(weight|bias)"
    else:
        decoder = linear_decoder(file, "decode_head.conv_seg.weight", 4)
        transforms["decoder.head.weight"] = lambda weight: weight.flatten(1)
    agree(file, "backbone", backbone, {"num_layers": vit["depth"], "embed_dims": vit["embed_dim"]})
    agree(file, "backbone", backbone, {"patch_size": vit["patch_size"]})
    agree(file, "decode_head", head, {"num_classes": decoder["num_classes"]})
    if masks:
        agree(file, "decode_head", head, {"num_layers": decoder["depth"], "embed_dims": decoder["dim"]})
    info = CheckpointInfo("mmsegmentation Segmenter", **normalization(config, model), **dataset(file))
    return Recipe(info, model_of(vit, decoder), RENAMES, transforms, ignored)


def transposed(weight: Tensor) -> Tensor:
    return weight.t() if weight.dim() == 2 else weight  # another shape is refused by its name later


def training_config(file: CheckpointFile) -> Config:
    """The config that the file carries as Python text: assignments of literals and dict(...) calls, read and never run.

    Empty where there is none; a value that is no literal is left out.
    """
    meta = mapping(file.extras.get("meta"))
    text = meta.get("cfg", meta.get("config"))  # mmengine, mmcv
    try:
        statements = ast.parse(text).body if isinstance(text, str) else []
    except (SyntaxError, ValueError, RecursionError):
        return {}
    config: Config = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                config[statement.targets[0].id] = literal(statement.value)
            except (ValueError, RecursionError):
                continue
    return config


def literal(node: ast.expr) -> Any:
    """Value of a literal that may hold ``dict(key=value)`` calls; ValueError for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if isinstance(node, ast.Dict):
        return {
            literal(key): literal(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None
        }
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [literal(element) for element in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    return ast.literal_eval(node)


def refuse_otherwise(file: CheckpointFile, part: str, told: Config) -> None:
    """Refuse a config that tells of something else than EXPECTED."""
    for name, expected in EXPECTED[part].items():
        value = told.get(name, expected)
        if value != expected:
            raise NotImplementedError(f"{file.path}: expected a {part} with {name}={expected!r}, got {value!r}")


def refuse_other_norms(file: CheckpointFile, part: str, told: Config) -> None:
    kind = mapping(told.get("norm_cfg")).get("type", "LN")
    if kind != "LN":
        raise NotImplementedError(f"{file.path}: expected a {part} with norm_cfg of type 'LN', got {kind!r}")


def refuse_other_outputs(file: CheckpointFile, backbone: Config, head: Config, depth: int) -> None:
    """The decoder here takes the patches after the last block, and nothing else."""
    outputs = backbone.get("out_indices", -1)
    last = outputs[-1] if is_sequence(outputs) and outputs else outputs
    for name, value, good, expected in (
        ("backbone", f"out_indices={outputs!r}", last in (-1, depth - 1), f"out_indices ending in -1 or {depth - 1}"),
        ("backbone", "output_cls_token=True", not backbone.get("output_cls_token"), "output_cls_token=False"),
        ("decode_head", f"in_index={head.get('in_index')!r}", head.get("in_index", -1) == -1, "in_index=-1"),
    ):
        if not good:
            raise NotImplementedError(f"{file.path}: expected a {name} with {expected}, got {value}")


def agree(file: CheckpointFile, part: str, told: Config, found: dict[str, int]) -> None:
    """Refuse a config whose sizes are not those of the tensors."""
    for name, size in found.items():
        agreed(file, f"{part}.{name}", told.get(name), size)


def norm_eps(part: Config, default: float) -> float:
    """Epsilon of a part's LayerNorms; torch's own where its norm_cfg names none."""
    return mapping(part["norm_cfg"]).get("eps", 1e-5) if "norm_cfg" in part else default


def normalization(config: Config, model: Config) -> dict[str, Any]:
    """Mean and standard deviation of images in [0, 1]; nothing where the config does not tell of RGB images."""
    told = mapping(model.get("data_preprocessor")) or mapping(config.get("img_norm_cfg"))
    mean, std = told.get("mean"), told.get("std")
    if not (told.get("bgr_to_rgb") or told.get("to_rgb")) or mean is None or std is None:
        return {}
    return {"mean": scaled(mean), "std": scaled(std)}


def scaled(values: Any) -> Any:
    """From 0..255 to 0..1; what is no number stays, for `check_normalization` to name."""
    if not is_sequence(values):
        return values
    return tuple(value / 255 if type(value) in (int, float) else value for value in values)


def dataset(file: CheckpointFile) -> dict[str, Any]:
    """Names and colours of the classes; nothing where the file does not tell."""
    meta = mapping(file.extras.get("meta"))
    told = mapping(meta.get("dataset_meta")) or {name.lower(): meta.get(name) for name in ("CLASSES", "PALETTE")}
    classes, palette = told.get("classes"), told.get("palette")
    colours = palette if is_sequence(palette) and all(map(is_sequence, palette)) else None
    return {
        "classes": tuple(classes) if is_sequence(classes) else None,
        "palette": None if colours is None else tuple(map(tuple, colours)),
    }


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))
