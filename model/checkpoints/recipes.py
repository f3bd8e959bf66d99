"""From a checkpoint file to the model in it: the format by its keys, sizes by shapes, the rest by the config with it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ...checks import check_grid, check_int, describe
from .config import FORMAT_VERSION, as_tuple
from .files import CheckpointFile, config_path, read_json, read_yaml
from .formats import MMSEG, OURS, SEGMENTER, TIMM, Config, Format, Shapes, decoder_config, vit_config

__all__ = ["TOLD", "CheckpointInfo", "Hints", "recipe_of", "shortened"]

NORMALIZATIONS: dict[str, dict[str, Any]] = {  # Segmenter's names
    "vit": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "deit": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}
# How mmsegmentation's own Segmenter configs set what no tensor tells: patterns of the values.
USUAL = {
    "act_cfg": r"dict\(type='GELU'\)",
    "align_corners": "False",
    "in_index": "-1",
    "interpolate_mode": "'bicubic'",
    "norm_cfg": r"(?!.*'LN').*|.*\beps=1e-0?6\b.*",
    "num_fcs": "2",
    "output_cls_token": "False",
    "with_cls_token": "True",
}
TOLD = ("mean", "std", "classes", "palette")  # what a config of ours keeps of a CheckpointInfo


@dataclass(frozen=True)
class Hints:
    """What the caller says where the file is silent; None: nothing."""

    img_size: tuple[int, int] | None = None
    num_heads: int | None = None
    quota: int | None = None

    def __post_init__(self) -> None:
        if self.img_size is not None:
            check_grid("img_size", self.img_size)
        if self.num_heads is not None:
            check_int("num_heads", self.num_heads, minimum=1)
        if self.quota is not None:
            check_int("quota", self.quota, minimum=0)

    def agreed(self, file: CheckpointFile, **told: Any) -> Hints:
        """With what the file's config tells; ValueError where that is another value."""
        known = asdict(self)
        for name, value in told.items():
            if name == "img_size" and isinstance(value, int):
                value = (value, value)
            value = tuple(value) if isinstance(value, list) else value
            if None not in (value, known[name]) and value != known[name]:
                raise ValueError(f"{name}: expected {value}, as the config of {file.path} tells, got {known[name]}")
            known[name] = value if known[name] is None else known[name]
        return Hints(**known)


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
        vit = vit_config(Shapes(file, TIMM), hints.img_size, hints.num_heads, eps=1e-6, position_rule="bicubic")
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
    if not isinstance(schedule, (list, tuple)) or len(schedule) < 2:
        raise ValueError(
            f"{file.path}: expected policy_schedule in variant.yml to be a pair of numbers, got {describe(schedule)}"
        )
    shapes, shares = Shapes(file, SEGMENTER), any(key.startswith("policy_net.") for key in file.tensors)
    known = hints.agreed(file, img_size=variant.get("image_size"), num_heads=variant.get("n_heads"))
    vit = vit_config(shapes, known.img_size, known.num_heads, eps=1e-5, position_rule="bilinear")
    config = model_of(vit, decoder_config(shapes, None))
    sizes = {"d_model": vit["embed_dim"], "n_layers": vit["depth"], "patch_size": vit["patch_size"]}
    for size, value in (sizes | {"n_cls": config["decoder"]["num_classes"]}).items():
        if variant.get(size, value) != value:
            raise ValueError(f"{file.path}: expected variant.yml to tell {size}={value}, got {variant[size]!r}")
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
    """As mmsegmentation's own Segmenter configs have it, where no tensor tells."""
    shapes, meta = Shapes(file, MMSEG), mapping(file.extras.get("meta"))
    vit = vit_config(shapes, hints.img_size, hints.num_heads, eps=1e-6, position_rule="bicubic") | {"kind": "MmsegViT"}
    refuse_other_settings(file, str(meta.get("cfg", meta.get("config"))), vit)  # mmengine, mmcv
    config = model_of(vit, decoder_config(shapes, vit["num_heads"]))
    return MMSEG, config, CheckpointInfo(MMSEG.name, **dataset(meta))


def refuse_other_settings(file: CheckpointFile, training_config: str, vit: Config) -> None:
    """Search the Python text of a training config, which is not run, for values that the model here does not compute with."""
    (height, width), last = vit["img_size"], vit["depth"] - 1
    usual = USUAL | {
        "num_heads": str(vit["num_heads"]),
        "img_size": rf"\({height},{width},?\)" + (f"|{height}" if height == width else ""),
        "out_indices": rf"-1|{last}|[\[(](.*,)?(-1|{last}),?[\])]",
    }
    text = "".join(training_config.split())
    for name, value in re.findall(r"\b(\w+)=(?=(\w*\([^()]*\)|\[[^\]]*\]|[^,()]+))", text):
        if name in usual and not re.fullmatch(usual[name], value):
            raise ValueError(
                f"{file.path}: expected a training config like mmsegmentation's own of Segmenter, with num_heads="
                f"{vit['num_heads']} and img_size={vit['img_size']}, got {name}={value}"
            )


def dataset(meta: Config) -> dict[str, Any]:
    """Names and colours of the classes; nothing where the file does not tell."""
    told = mapping(meta.get("dataset_meta")) or {name.lower(): meta.get(name) for name in ("CLASSES", "PALETTE")}
    classes, palette = as_tuple(told.get("classes")), as_tuple(told.get("palette"))
    coloured = isinstance(palette, tuple) and all(isinstance(colour, tuple) for colour in palette)
    return {
        "classes": classes if isinstance(classes, tuple) else None,
        "palette": palette if coloured else None,
    }


def model_of(vit: Config, decoder: Config | None = None) -> Config:
    return {"vit": vit, "resample": "area", "policy": None, "exits": {}, "decoder": decoder}


def mapping(value: object) -> Config:
    """``value`` if it is a dict; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def shortened(names: list[str], limit: int = 20) -> str:
    """Names in a message, the first ones of a long list."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
