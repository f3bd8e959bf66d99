"""load_checkpoint and save_checkpoint: models of other people's files, and this package's own format.

That is safetensors and, beside them, the model as plain JSON values: a part is the name of its class and the arguments of its
constructor, which it keeps as attributes of the same names. What it keeps as a tensor (a threshold) comes with the tensors.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ...checks import check_grid, check_int, describe
from ...extras import import_extra
from ...files import replacing
from ..encoder import StepEncoder
from ..heads.atm import AtmDecoder, AtmExit
from ..heads.decoders import LinearDecoder, MaskTransformerDecoder
from ..heads.exits import CosineExit, LinearExit
from ..info import CheckpointInfo
from ..policies.base import QuotaPolicy, VariancePolicy
from ..policies.cts import CTSPolicy
from ..policies.net import PolicyNet
from ..segmenter import StepSegmenter
from ..vit import ViT, ViTConfig
from .files import SUFFIXES, CheckpointFile, as_path, as_tuple, mapping, read_file, read_text, refusal, shortened
from .formats import Config, Format, public_recipe

__all__ = ["CheckpointInfo", "checkpoint_info", "load_checkpoint", "load_encoder", "load_segmenter", "save_checkpoint"]

OURS, VERSION = Format("step-kernels"), 1
# What is kept of a CheckpointInfo.
TOLD = ("mean", "std", "classes", "palette", "window", "stride", "resize", "enlarge", "stretch")
PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "vit": (ViT,),
    "policy": (VariancePolicy, PolicyNet, CTSPolicy, QuotaPolicy),
    "exits": (LinearExit, CosineExit, AtmExit),
    "decoder": (LinearDecoder, MaskTransformerDecoder, AtmDecoder),
}


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    img_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    quota: int | None = None,
    prefix: str | None = None,
) -> StepSegmenter | StepEncoder:
    """The model of a checkpoint, on the CPU, in eval mode.

    Formats, recognised by their keys, as .pth (``torch.load`` with weights_only=True) or safetensors: timm ViT; Segmenter and CTS-Segmenter, with
    the variant.yml beside them; mmsegmentation Segmenter and DToP, by the training config inside; and what `save_checkpoint` wrote. Nothing that
    a file brings along is ever run. What neither tensors nor config tell is the format's own.

    Every tensor of the model must come from the file, and every tensor of the file must be used, or be known as one that segmentation has no use
    for (a classifier; see `checkpoint_info`). Parameters keep the file's dtype, the widest one where it has several (this package's: each its own).

    Args:
        path: a file (.safetensors, .pth, .pt, .bin, .ckpt, .tar), or a folder with one such file.
        img_size: (height, width) in pixels that the position embeddings are stored for. None: what the config tells, or a square.
        num_heads: attention heads of the ViT, and of mmsegmentation's mask transformer where no config tells. None: what the config tells, or the
            standard number of tiny, small, base and large.
        quota: CTS-Segmenter only: 2x2 blocks merged per image. None: what variant.yml tells.
        prefix: what the names of the tensors to read begin with, those of nested dicts joined by dots, such as ``"teacher.backbone."``; others are
            left out. None: nothing, or words such as ``model.`` and ``module.``, and one model alone.

    Returns:
        A `StepSegmenter`; a `StepEncoder` where the file has no decoder (timm). Its attribute ``info`` is `checkpoint_info`'s.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged or of no known format; it holds a pickled class that is refused (named); keys are missing, unused (a ViT with
            other parts: `StepEncoder.from_timm` runs timm's) or of a wrong shape (named); a threshold (named) means nothing; an argument is
            needed, or contradicts the file; a config tells of another network.
        ImportError: safetensors, PyYAML or (CTS) timm is needed and missing.
        TypeError: an argument of a wrong type.
    """
    hints = {
        "img_size": None if img_size is None else check_grid("img_size", img_size),
        "num_heads": None if num_heads is None else check_int("num_heads", num_heads, minimum=1),
        "quota": None if quota is None else check_int("quota", quota, minimum=0),
        "prefix": prefix,
    }
    file = read_file(path)
    kind, config, info = own_recipe(file, hints) or public_recipe(file, hints)
    try:
        model = build_model(config)
    except KeyError as error:
        raise refusal(f"{file.path}: config", f"an entry {error}", "none") from error
    except (TypeError, AttributeError) as error:
        raise refusal(f"{file.path}: config", "the arguments of the parts", f"others: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    tensors, ignored = matched_tensors(model, file, kind)
    model.info = replace(info, ignored=ignored)
    model.info.check(file.path, config["vit"].get("in_chans", 3))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class Hints(TypedDict, total=False):
    img_size: tuple[int, int] | None
    num_heads: int | None
    quota: int | None
    prefix: str | None


def load_segmenter(path: str | os.PathLike[str], **hints: Unpack[Hints]) -> StepSegmenter:
    """`load_checkpoint`, with its arguments and errors, of a file with a decoder; TypeError where it has none."""
    if isinstance(model := load_checkpoint(path, **hints), StepSegmenter):
        return model
    kind = f"a {model.info.format} checkpoint without decoder, which load_encoder reads"
    raise TypeError(f"{path}: expected a segmenter, got {kind}")


def load_encoder(path: str | os.PathLike[str], **hints: Unpack[Hints]) -> StepEncoder:
    """`load_checkpoint`, with its arguments and errors, of a file without decoder; TypeError where it has one."""
    if isinstance(model := load_checkpoint(path, **hints), StepEncoder):
        return model
    kind = f"a {model.info.format} checkpoint with a decoder, which load_segmenter reads"
    raise TypeError(f"{path}: expected an encoder alone, got {kind}")


def checkpoint_info(path: str | os.PathLike[str], **hints: Unpack[Hints]) -> CheckpointInfo:
    """What a file tells beside the model, ``load_checkpoint(...).info``. Arguments and errors are `load_checkpoint`'s."""
    return load_checkpoint(path, **hints).info


def save_checkpoint(
    model: StepSegmenter | StepEncoder, path: str | os.PathLike[str], *, info: CheckpointInfo | None = None
) -> Path:
    """Write a model as safetensors and a JSON config beside it; `load_checkpoint` reads it back with equal outputs.

    Neither file is touched before both are written. Dtypes are kept, devices are not: everything is loaded on the CPU.

    Args:
        model: a `StepSegmenter` or `StepEncoder` on a plain `ViT`; policies, exits and decoders of this package.
        path: a file named ``*.safetensors`` (config: the same name with .json), or a folder, made if missing, for model.safetensors and config.json.
        info: what to keep with it, instead of what it was loaded with: ``dataclasses.replace(model.info, mean=..., std=...)`` changes a part.

    Returns:
        The safetensors file.

    Raises:
        TypeError: an argument of a wrong type.
        NotImplementedError: a part that a config cannot describe (a policy or ViT of another class), by its class.
        ValueError: another suffix, a mean or std that is not one number per channel of images in [0, 1] (those of uint8 pictures must be divided by
            255), neither of them told by ``info`` or the model, or a part that its class does not build so (a policy's deployed copy).
        ImportError: safetensors is missing.
    """
    if not isinstance(model, (StepSegmenter, StepEncoder)):
        raise TypeError(f"model: expected a StepSegmenter or StepEncoder, got {type(model).__name__}")
    if info is not None and not isinstance(info, CheckpointInfo):
        raise TypeError(f"info: expected a CheckpointInfo or None, got {describe(info)}")
    config = model_config(model)
    torch_format = import_extra("safetensors.torch", "safetensors", "checkpoints")
    kept = info or model.info
    if info is None and None in (kept.mean, kept.std):
        raise refusal("info", "a CheckpointInfo with mean and std, as the model was loaded with none", None)
    kept.check("info", config["vit"]["in_chans"])
    config["info"] = {name: getattr(kept, name) for name in TOLD}
    file = as_path(path)
    if file.suffix != ".safetensors":
        if file.suffix in SUFFIXES or file.is_file():
            raise refusal("path", "a folder or a file named *.safetensors", file)
        file /= "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    with replacing(file) as weights:
        weights.write_bytes(torch_format.save(tensors))  # its own save_file hides the system's errors
        with replacing(config_path(file)) as described:
            described.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return file


def matched_tensors(model: nn.Module, file: CheckpointFile, kind: Format) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The file's tensors by the model's names, and the names of those in the file that are ignored; others are refused."""
    expected = model.state_dict()
    sources = {name: kind.source(name) for name in expected}
    left_over = sorted(file.tensors.keys() - sources.values())
    ignored = tuple(name for name in left_over if re.fullmatch(kind.ignored, name))
    tensors = {name: file.tensors[key].detach() for name, key in sources.items() if key in file.tensors}
    tensors |= {name: change(tensors[name]) for name, change in kind.transforms.items() if name in tensors}
    problems = {
        "missing keys": sorted(set(sources.values()) - file.tensors.keys()),
        "unused keys": [name for name in left_over if name not in ignored],
        "wrong shapes": [
            f"{sources[name]} (expected {describe(expected[name])}, got {describe(tensor)})"
            for name, tensor in tensors.items()
            if tensor.shape != expected[name].shape or tensor.is_floating_point() != expected[name].is_floating_point()
        ],
    }
    found = [f"{len(names)} {problem}: {shortened(names)}" for problem, names in problems.items() if names]
    if found:
        raise refusal(file.path, f"the tensors of a {kind.name} checkpoint", "; ".join(found) + kind.otherwise)
    if kind is not OURS:
        floating = {name: x for name, x in tensors.items() if x.is_floating_point() and "threshold" not in name}
        widest = functools.reduce(torch.promote_types, {x.dtype for x in floating.values()})
        tensors |= {name: x.to(widest) for name, x in floating.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, ignored


def config_path(file: Path) -> Path:
    """Where the config of a safetensors file of ours lies."""
    return file.with_name("config.json") if file.name == "model.safetensors" else file.with_suffix(".json")


def own_recipe(file: CheckpointFile, given: Config) -> tuple[Format, Config, CheckpointInfo] | None:
    """How to read a file that `save_checkpoint` wrote; None for somebody else's."""
    source = config_path(file.path)
    config = mapping(read_text(source, "JSON", json.loads, ValueError) if file.path.suffix == ".safetensors" else None)
    if config.get("format") != OURS.name:
        return None
    if (version := config.get("format_version")) != VERSION:
        raise refusal(source, f"format_version {VERSION}", f"{version!r}: written by another version of step-kernels")
    for name, value in given.items():
        if value is not None:
            raise refusal(name, f"None, as {source} tells all sizes", value)
    if mapping(config.get("vit")).get("kind") == "MmsegViT":  # what earlier versions wrote for that rule
        config["vit"] |= {"kind": "ViT", "position_rule": "plain bicubic"}
    told = mapping(config.get("info"))
    file.select("")
    return OURS, config, CheckpointInfo(OURS.name, **{name: as_tuple(told[name]) for name in TOLD if name in told})


def model_config(model: StepSegmenter | StepEncoder) -> Config:
    """What `build_model` needs to build ``model`` again, but for its tensors.

    NotImplementedError names a part whose class is not in `PARTS`, ValueError one that its class would build otherwise.
    """
    encoder, decoder = (model.encoder, model.decoder) if isinstance(model, StepSegmenter) else (model, None)
    config: Config = {"format": OURS.name, "format_version": VERSION, "resample": encoder.resample}
    config |= {role: part_config(role, getattr(encoder, role)) for role in ("vit", "policy")}
    config["exits"] = {number: part_config("exits", head) for number, head in encoder.exits.items()}
    config["decoder"] = part_config("decoder", decoder)
    own, built = structure(model), structure(build_model(config))
    for name in [*own, *built]:
        if own.get(name) != built.get(name):
            wanted = f"{name} to be as its class builds it ({built.get(name, 'absent')})"
            raise refusal("model", wanted, f"{own.get(name, 'absent')}: a changed part, or a policy's deployed copy")
    return config


def structure(model: nn.Module) -> dict[str, str]:
    """Shapes of the state dict, and by name the settings of modules that no shape tells."""
    told = {name: f"shape {list(tensor.shape)}" for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        told |= {f"{name}.{key}": str(getattr(module, key)) for key in ("eps", "num_heads") if hasattr(module, key)}
    return told


def build_model(config: Config) -> StepSegmenter | StepEncoder:
    """The model of a config, on the meta device: its parameters and buffers are still to be assigned."""
    with torch.device("meta"):
        vit, policy, decoder = (build_part(role, config[role]) for role in ("vit", "policy", "decoder"))
        exits = {int(number): build_part("exits", head) for number, head in config["exits"].items()}
        encoder = StepEncoder(vit, policy, exits, resample=config["resample"])
        return encoder if decoder is None else StepSegmenter(encoder, decoder)


def part_config(role: str, part: Any) -> Any:
    """A module as its class, exactly, as a subclass may compute something else, and its arguments; anything else as it is."""
    if not isinstance(part, nn.Module):
        return part
    kind = type(part)
    if kind not in PARTS[role]:
        wanted = f"one of {', '.join(cls.__name__ for cls in PARTS[role])}, which a checkpoint can describe"
        raise NotImplementedError(f"{role}: expected {wanted}, got {kind.__name__}")
    names = inspect.signature(kind).parameters
    values = asdict(part.config) if isinstance(part, ViT) else {name: getattr(part, name) for name in names}
    plain = {name: part_config(role, value) for name, value in values.items() if not isinstance(value, Tensor)}
    return {"kind": kind.__name__, **plain}


def build_part(role: str, config: Any) -> Any:
    """What `part_config` has described."""
    if not isinstance(config, dict):
        return as_tuple(config)
    kinds = {cls.__name__: cls for cls in PARTS[role]}
    if config["kind"] not in kinds:
        raise refusal("config", f"{role} to be one of {', '.join(kinds)}", repr(config["kind"]))
    kind, arguments = kinds[config["kind"]], {name: build_part(role, value) for name, value in config.items()}
    del arguments["kind"]
    if kind is VariancePolicy:
        arguments["threshold"] = 0.0  # a tensor, still to come
    return ViT(ViTConfig(**arguments)) if kind is ViT else kind(**arguments)
