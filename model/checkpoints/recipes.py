"""From a checkpoint file to the model in it: the format by its keys, sizes by shapes, the rest by what lies with it or the caller says."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ...checks import check_grid, check_int, describe
from .config import FORMAT_VERSION, as_tuple
from .files import CheckpointFile, config_path, read_json, read_yaml
from .formats import MMSEG, OURS, SEGMENTER, TIMM, Config, Format, Shapes

__all__ = ["TOLD", "CheckpointInfo", "Hints", "recipe_of", "shortened"]

NORMALIZATIONS: dict[str, dict[str, Any]] = {  # Segmenter's names
    "vit": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "deit": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
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
            object.__setattr__(self, "img_size", check_grid("img_size", self.img_size))
        if self.num_heads is not None:
            check_int("num_heads", self.num_heads, minimum=1)
        if self.quota is not None:
            check_int("quota", self.quota, minimum=0)

    def agreed(self, file: CheckpointFile, **told: Any) -> Hints:
        """With what the file's config tells; ValueError where that is another value."""
        known = asdict(self)
        for name, value in told.items():
            if name == "img_size":
                value = (value, value) if isinstance(value, int) else as_tuple(value)
            if None not in (value, known[name]) and value != known[name]:
                raise ValueError(f"{name}: expected {value}, as the config of {file.path} tells, got {known[name]}")
            known[name] = value if known[name] is None else known[name]
        return Hints(**known)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint tells beside the model; None where the file does not tell.

    Attributes:
        format: the format's name.
        ignored: tensors of the file that the model has no use for, by the file's names.
        mean, std: per channel (RGB), of images in [0, 1].
        classes: names of the classes.
        palette: one (red, green, blue) in 0..255 per class.
    """

    format: str
    ignored: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, ...], ...] | None = None


Recipe = tuple[Format, Config, CheckpointInfo]  # the config as `build_model` takes it; `ignored` is still to come


def recipe_of(file: CheckpointFile, hints: Hints) -> Recipe:
    """How to read ``file``: by its own config if `save_checkpoint` wrote it, else by its keys."""
    config = read_json(config_path(file.path)) if file.path.suffix == ".safetensors" else None
    if isinstance(config, dict) and config.get("format") == OURS.name:
        return our_recipe(file, config, hints)
    for kind in (SEGMENTER, MMSEG, TIMM):
        if all(any(re.fullmatch(pattern, key) for key in file.tensors) for pattern in kind.telling):
            try:
                return public_recipe(file, kind, hints)
            except (TypeError, AttributeError, IndexError, KeyError) as error:
                raise ValueError(f"{file.path}: expected a config of plain sizes, got others: {error}") from error
    raise ValueError(
        f"{file.path}: expected a timm ViT, Segmenter, CTS-Segmenter or mmsegmentation Segmenter checkpoint (or one of "
        f"save_checkpoint with its config beside it), got tensors {shortened(sorted(file.tensors))}"
    )


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


def public_recipe(file: CheckpointFile, kind: Format, hints: Hints) -> Recipe:
    """For a file of somebody else's: Segmenter and CTS-Segmenter tell more in variant.yml, mmsegmentation in the file itself."""
    shapes, told = Shapes(file, kind), dict[str, Any]()
    meta = mapping(file.extras.get("meta"))
    shares = kind is SEGMENTER and any(key.startswith("policy_net.") for key in file.tensors)
    variant = mapping(read_yaml(file.path.with_name("variant.yml")).get("net_kwargs")) if kind is SEGMENTER else {}
    known = hints.agreed(file, img_size=variant.get("image_size"), num_heads=variant.get("n_heads"))
    missing = [name for name in ("num_heads", "img_size") if getattr(known, name) is None]
    if kind is MMSEG and missing and ("cfg" in meta or "config" in meta):  # it may tell of others than the usual ones
        raise ValueError(
            f"{' and '.join(missing)}: expected the backbone's in the training config, a text in {file.path} that is not read, got None"
        )
    vit = shapes.vit(known.img_size, known.num_heads)
    config = {"vit": vit, "resample": "area", "policy": None, "exits": {}, "decoder": None}
    if kind is not TIMM:  # Segmenter's decoder has one attention head per 64 channels
        config["decoder"] = shapes.decoder(vit["num_heads"] if kind is MMSEG else None)
    if kind is SEGMENTER:
        check_variant(file, variant, config, shares)
        told = NORMALIZATIONS.get(variant.get("normalization", ""), {})
    elif kind is MMSEG:
        told = dataset(meta)
    if shares:
        quota = known.agreed(file, quota=(variant.get("policy_schedule") or (None, None))[1]).quota
        if quota is None:
            raise ValueError(
                f"quota: expected the number of 2x2 blocks to share per image, which no variant.yml beside {file.path} "
                "tells, got None"
            )
        config["policy"] = {"kind": "QuotaPolicy", "count": quota, "scorer": {"kind": "CTSPolicy"}}
        config["resample"] = "bilinear"
    elif known.quota is not None:
        raise ValueError(f"quota: expected None, as {file.path} holds no CTS policy, got {known.quota}")
    return kind, config, CheckpointInfo("CTS-Segmenter" if shares else kind.name, **told)


def check_variant(file: CheckpointFile, variant: Config, config: Config, shares: bool) -> None:
    """Refuse a variant.yml that is not that of the tensors beside it."""
    name, schedule, vit = variant.get("normalization"), variant.get("policy_schedule"), config["vit"]
    if shares and schedule and (not isinstance(schedule, (list, tuple)) or len(schedule) < 2):
        wanted = "expected policy_schedule in variant.yml to be a pair of numbers"
        raise ValueError(f"{file.path}: {wanted}, got {describe(schedule)}")
    if name not in (None, *NORMALIZATIONS):
        wanted = f"expected normalization in variant.yml to be {' or '.join(NORMALIZATIONS)}"
        raise ValueError(f"{file.path}: {wanted}, got {describe(name)}")
    sizes = {"d_model": vit["embed_dim"], "n_layers": vit["depth"], "patch_size": vit["patch_size"]}
    for size, value in (sizes | {"n_cls": config["decoder"]["num_classes"]}).items():
        if variant.get(size) not in (None, value):
            raise ValueError(f"{file.path}: expected variant.yml to tell {size}={value}, got {variant[size]!r}")


def dataset(meta: Config) -> dict[str, Any]:
    """Names and colours of the classes, as mmengine or the older mmcv keep them; nothing where the file does not tell."""
    told = mapping(meta.get("dataset_meta")) or {name.lower(): meta.get(name) for name in ("CLASSES", "PALETTE")}
    classes, palette = (
        value if isinstance(value, tuple) else None for value in map(as_tuple, map(told.get, ("classes", "palette")))
    )
    coloured = all(isinstance(colour, tuple) for colour in palette or ())
    return {"classes": classes, "palette": palette if coloured else None}


def mapping(value: object) -> Config:
    """``value`` if it is a dict; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def shortened(names: list[str], limit: int = 20) -> str:
    """Names in a message, the first ones of a long list."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
