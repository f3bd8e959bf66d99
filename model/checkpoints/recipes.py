"""From a checkpoint file to the model in it: the format by its keys, sizes by shapes, the rest by the config with it."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from ...checks import describe
from .config import FORMAT_VERSION, as_tuple
from .files import CheckpointFile, config_path, read_json, read_yaml
from .formats import (
    MMSEG,
    OURS,
    SEGMENTER,
    TIMM,
    Config,
    Format,
    Hints,
    Shapes,
    decoder_config,
    vit_config,
)

__all__ = ["TOLD", "CheckpointInfo", "recipe_of", "shortened"]

NORMALIZATIONS: dict[object, dict[str, Any]] = {  # Segmenter's names
    "vit": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "deit": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}
TOLD = ("mean", "std", "classes", "palette")  # what a config of ours keeps of a CheckpointInfo


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


Recipe = tuple[Format, Config, CheckpointInfo]  # the config as `build_model` takes it; `ignored` is still to come


def recipe_of(file: CheckpointFile, hints: Hints) -> Recipe:
    """How to read ``file``: by its own config if `save_checkpoint` wrote it, else by its keys.

    Raises:
        ValueError: no known format; a size that neither the file nor ``hints`` tell, or on which they contradict; a value in
            a config that makes no sense.
    """
    config = read_json(config_path(file.path)) if file.path.suffix == ".safetensors" else None
    if isinstance(config, dict) and config.get("format") == OURS.name:
        return our_recipe(file, config, hints)
    try:
        recipe = public_recipe(file, hints)
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{file.path}: expected a config of plain sizes, got others: {error}") from error
    if hints.quota is not None and recipe[1]["policy"] is None:
        raise ValueError(f"quota: expected None, as {file.path} holds no CTS policy, got {hints.quota}")
    return recipe


def our_recipe(file: CheckpointFile, config: Config, hints: Hints) -> Recipe:
    source, version = config_path(file.path), config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{source}: expected format_version {FORMAT_VERSION}, got {version!r}: written by another version of step-kernels"
        )
    for name, value in asdict(hints).items():
        if value is not None:
            raise ValueError(f"{name}: expected None, as {source} tells all sizes, got {value}")
    told = mapping(config.get("info"))
    return OURS, config, CheckpointInfo(OURS.name, **{name: as_tuple(told.get(name)) for name in TOLD})


def public_recipe(file: CheckpointFile, hints: Hints) -> Recipe:
    keys = file.tensors.keys()
    if "encoder.patch_embed.proj.weight" in keys and any(key.startswith("decoder.") for key in keys):
        return segmenter_recipe(file, hints)
    if "backbone.patch_embed.projection.weight" in keys:
        return mmseg_recipe(file, hints)
    if "patch_embed.proj.weight" in keys and any(key.startswith("blocks.") for key in keys):
        vit = vit_config(Shapes(file, TIMM), hints, eps=1e-6, position_rule="bicubic")
        return TIMM, model_of(vit), CheckpointInfo(TIMM.name)
    raise ValueError(
        f"{file.path}: expected a timm ViT, Segmenter, CTS-Segmenter or mmsegmentation Segmenter checkpoint (or one of "
        f"save_checkpoint with its config beside it), got tensors {shortened(sorted(keys))}"
    )


def segmenter_recipe(file: CheckpointFile, hints: Hints) -> Recipe:
    """Segmenter and CTS-Segmenter: every LayerNorm has torch's eps; decoders have one attention head per 64 channels."""
    variant = mapping(read_yaml(file.path.with_name("variant.yml")).get("net_kwargs"))
    name, schedule = variant.get("normalization"), variant.get("policy_schedule") or (None, None)
    if name is not None and name not in tuple(NORMALIZATIONS):
        names = " or ".join(map(str, NORMALIZATIONS))
        raise ValueError(f"{file.path}: expected normalization in variant.yml to be {names}, got {describe(name)}")
    if not is_sequence(schedule) or len(schedule) < 2:
        raise ValueError(
            f"{file.path}: expected policy_schedule in variant.yml to be a pair of numbers, got {describe(schedule)}"
        )
    shapes, shares = Shapes(file, SEGMENTER), any(key.startswith("policy_net.") for key in file.tensors)
    known = hints.agreed(file, img_size=variant.get("image_size"), num_heads=variant.get("n_heads"))
    vit = vit_config(shapes, known, eps=1e-5, position_rule="bilinear")
    config = model_of(vit, decoder_config(shapes, None))
    sizes = {"d_model": vit["embed_dim"], "n_layers": vit["depth"], "patch_size": vit["patch_size"]}
    expect(file, "variant.yml", variant, sizes | {"n_cls": config["decoder"]["num_classes"]})
    if shares:
        quota = known.agreed(file, quota=schedule[1]).quota
        if quota is None:
            raise ValueError(
                f"quota: expected the number of 2x2 blocks to share per image, which no variant.yml beside {file.path} "
                "tells, got None"
            )
        config["policy"] = {"kind": "QuotaPolicy", "count": quota, "scorer": {"kind": "CTSPolicy"}}
        config["resample"] = "bilinear"
    normalization = {} if name is None else NORMALIZATIONS[name]
    return SEGMENTER, config, CheckpointInfo("CTS-Segmenter" if shares else SEGMENTER.name, **normalization)


def mmseg_recipe(file: CheckpointFile, hints: Hints) -> Recipe:
    """By the training config in the file; where it is silent, the values of mmsegmentation's own Segmenter configs hold."""
    meta = mapping(file.extras.get("meta"))
    told = python_config(meta.get("cfg", meta.get("config")))  # mmengine, mmcv
    body, head, shapes = "model.backbone.", "model.decode_head.", Shapes(file, MMSEG)
    known = hints.agreed(file, img_size=told.get(f"{body}img_size"), num_heads=told.get(f"{body}num_heads"))
    eps = told.get(f"{body}norm_cfg.eps", 1e-5 if f"{body}norm_cfg.type" in told else 1e-6)
    vit = vit_config(shapes, known, eps=eps, position_rule=told.get(f"{body}interpolate_mode", "bicubic"))
    decoder = decoder_config(shapes, told.get(f"{head}num_heads") or vit["num_heads"])

    outputs = told.get(f"{body}out_indices", -1)  # the decoder takes the patches after the last block, and nothing else
    last = outputs[-1] if is_sequence(outputs) and outputs else outputs
    blocks = {"act_cfg.type": "GELU", "num_fcs": 2, "norm_cfg.type": "LN"}
    sizes = {"num_layers": vit["depth"], "embed_dims": vit["embed_dim"], "patch_size": vit["patch_size"]}
    sizes |= {"out_indices": outputs if last in (-1, vit["depth"] - 1) else -1}
    ways = {"type": "VisionTransformer", "with_cls_token": True, "output_cls_token": False}
    expect(file, "its training config", told, sizes | ways | blocks, body)
    ways, sizes = {"align_corners": False, "in_index": -1}, {"num_classes": decoder["num_classes"]}
    if "depth" in decoder:  # a linear head has neither the blocks nor the norms that a config may still describe
        ways |= blocks | {"norm_cfg.eps": 1e-5}
        sizes |= {"num_layers": decoder["depth"], "embed_dims": decoder["dim"]}
    expect(file, "its training config", told, sizes | ways, head)
    info = CheckpointInfo(MMSEG.name, **normalization(told), **dataset(meta))
    return MMSEG, model_of(vit | {"kind": "MmsegViT"}, decoder), info


def python_config(text: object) -> Config:
    """The literals in a Python config by their path through dict(...) calls, "model.backbone.num_heads"; read, never run."""

    def literals(name: str, node: ast.expr) -> Iterator[tuple[str, Any]]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            entries = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            entries = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        else:
            with contextlib.suppress(ValueError, TypeError):
                yield name, ast.literal_eval(node)
            return
        for key, value in entries:
            yield from literals(f"{name}.{key}", value)

    try:
        lines = [line for line in ast.parse(str(text or "")).body if isinstance(line, ast.Assign)]
        return dict(found for line in lines for found in literals(ast.unparse(line.targets[0]), line.value))
    except (SyntaxError, ValueError, RecursionError):
        return {}


def normalization(told: Config) -> dict[str, Any]:
    """Mean and standard deviation, of pixels in [0, 1], that a training config tells of RGB images."""
    for part, rgb in (("model.data_preprocessor.", "bgr_to_rgb"), ("img_norm_cfg.", "to_rgb")):
        if told.get(part + rgb):
            return {name: scaled(told.get(part + name)) for name in ("mean", "std")}
    return {}


def scaled(values: Any) -> Any:
    """From 0..255 to 0..1; what is no number stays, for `check_normalization` to name."""
    if not is_sequence(values):
        return values
    return tuple(value / 255 if type(value) in (int, float) else value for value in values)


def dataset(meta: Config) -> dict[str, Any]:
    """Names and colours of the classes; nothing where the file does not tell."""
    told = mapping(meta.get("dataset_meta")) or {name.lower(): meta.get(name) for name in ("CLASSES", "PALETTE")}
    classes, palette = told.get("classes"), told.get("palette")
    colours = tuple(map(tuple, palette)) if is_sequence(palette) and all(map(is_sequence, palette)) else None
    return {"classes": tuple(classes) if is_sequence(classes) else None, "palette": colours}


def model_of(vit: Config, decoder: Config | None = None) -> Config:
    return {"vit": vit, "resample": "area", "policy": None, "exits": {}, "decoder": decoder}


def expect(file: CheckpointFile, source: str, told: Config, same: Config, prefix: str = "") -> None:
    """Refuse a config that tells of something else than the file's tensors, or than this package's models compute."""
    for name, value in same.items():
        if (found := told.get(prefix + name, value)) != value:
            raise ValueError(f"{file.path}: expected {source} to tell {prefix}{name}={value!r}, got {found!r}")


def mapping(value: object) -> Config:
    """``value`` if it is a dict; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def shortened(names: list[str], limit: int = 20) -> str:
    """Names in a message, the first ones of a long list."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
