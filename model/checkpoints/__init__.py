"""load_checkpoint and save_checkpoint: models of other people's files, and this package's own format."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checks import describe
from ..encoder import StepEncoder
from ..extras import import_extra
from ..segmenter import StepSegmenter
from .config import build_model, model_config
from .files import CheckpointFile, config_path, read_file, target_file
from .formats import Format
from .recipes import TOLD, CheckpointInfo, Hints, recipe_of, shortened

__all__ = ["CheckpointInfo", "checkpoint_info", "load_checkpoint", "save_checkpoint"]


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    img_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    quota: int | None = None,
) -> StepSegmenter | StepEncoder:
    """The model of a checkpoint, on the CPU, in eval mode.

    Formats, recognised by their keys, as .pth (``torch.load`` with weights_only=True) or safetensors: timm ViT; Segmenter and
    CTS-Segmenter, with the variant.yml beside them; mmsegmentation Segmenter; and what `save_checkpoint` wrote. Nothing that a
    file brings along is ever run. Epsilons, the rule that resizes positions, the decoder and, for CTS, policy and resampling
    are the format's own. What no tensor tells of an mmsegmentation model is assumed to be as in mmsegmentation's own Segmenter
    configs: GELU, norms with eps 1e-6 in the backbone, bicubic positions, the last block's output without the class token.

    Every tensor of the model must come from the file, and every tensor of the file must be used, or be known as one that
    segmentation has no use for (a classifier; see `checkpoint_info`). Parameters keep the file's dtype, the widest one
    where it has several (this package's own files: each its own).

    Position embeddings are resized whenever the grid is another one than the stored; Segmenter and mmsegmentation do so only
    when the number of patches is another one, so they differ on a grid of another shape and the same number of patches.

    Args:
        path: a file (.safetensors, .pth, .pt, .bin, .ckpt, .tar), or a folder with one such file.
        img_size: (height, width) in pixels that the position embeddings are stored for. None: what variant.yml tells, or a
            square; asked for, as num_heads is, where an mmsegmentation file holds its training config, a text that is not read.
        num_heads: attention heads of the ViT and of mmsegmentation's mask transformer, where another number cannot be told.
            None: what variant.yml tells, or the standard number of tiny, small, base and large.
        quota: CTS-Segmenter only: 2x2 blocks merged per image. None: what variant.yml tells.

    Returns:
        A `StepSegmenter`; a `StepEncoder` where the file has no decoder (timm).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is damaged or of no known format; it holds a pickled class that is refused (named); keys are
            missing, unused (a ViT with other parts: `StepEncoder.from_timm` runs timm's) or of a wrong shape (named); an
            argument is needed, or contradicts the file; a config beside the file tells of another network.
        ImportError: safetensors, PyYAML or (CTS) timm is needed and missing.
        TypeError: an argument of a wrong type.
    """
    model, tensors, _ = read(path, Hints(img_size, num_heads, quota))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def checkpoint_info(
    path: str | os.PathLike[str],
    *,
    img_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    quota: int | None = None,
) -> CheckpointInfo:
    """What a checkpoint tells beside the model: format, ignored tensors, normalisation of images, classes, palette.

    Args, Raises: as `load_checkpoint`, whose model this is about.
    """
    return read(path, Hints(img_size, num_heads, quota))[2]


def save_checkpoint(
    model: StepSegmenter | StepEncoder, path: str | os.PathLike[str], *, info: CheckpointInfo | None = None
) -> Path:
    """Write a model as safetensors and a JSON config beside it; `load_checkpoint` reads it back with equal outputs.

    Neither file is touched before both are written. Dtypes are kept, devices are not: everything is loaded on the CPU.

    Args:
        model: a `StepSegmenter` or `StepEncoder` on a plain `ViT`; policies, exits and decoders of this package.
        path: a file named ``*.safetensors`` (config: the same name with .json), or a folder, made if missing, for
            ``model.safetensors`` and ``config.json``.
        info: normalisation, classes and palette to keep with it, as `checkpoint_info` gives them.

    Returns:
        The safetensors file.

    Raises:
        TypeError: an argument of a wrong type.
        NotImplementedError: a part that a config cannot describe (a policy or ViT of another class), by its class.
        ValueError: another suffix, a mean or std that is not one finite number per channel, or a part that its class does not build so (a policy's deployed copy).
        ImportError: safetensors is missing.
    """
    if not isinstance(model, (StepSegmenter, StepEncoder)):
        raise TypeError(f"model: expected a StepSegmenter or StepEncoder, got {type(model).__name__}")
    if info is not None and not isinstance(info, CheckpointInfo):
        raise TypeError(f"info: expected a CheckpointInfo or None, got {describe(info)}")
    config = model_config(model)
    if info is not None:
        check_normalization("info", model, info)
        config["info"] = {name: getattr(info, name) for name in TOLD}
    torch_format = import_extra("safetensors.torch", "safetensors", "checkpoints")
    file = target_file(path)
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}
    parts = {target: target.with_name(f".{target.name}.part") for target in (config_path(file), file)}
    try:
        parts[config_path(file)].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        torch_format.save_file(tensors, parts[file])
        for target, part in parts.items():
            os.replace(part, target)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return file


def read(path: object, hints: Hints) -> tuple[StepSegmenter | StepEncoder, dict[str, Tensor], CheckpointInfo]:
    """A file's model on the meta device, its tensors by the model's names, and what else it tells."""
    file = read_file(path)
    kind, config, info = recipe_of(file, hints)
    try:
        model = build_model(config)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    check_normalization(file.path, model, info)
    tensors, ignored = matched_tensors(model, file, kind)
    return model, tensors, replace(info, ignored=tuple(ignored))


def check_normalization(source: object, model: StepSegmenter | StepEncoder, info: CheckpointInfo) -> None:
    """Refuse a mean or standard deviation that is not one finite number per channel, the latter positive."""
    channels = (model.encoder if isinstance(model, StepSegmenter) else model).vit.embedding.in_channels
    for name, values, kind in (("mean", info.mean, "finite"), ("std", info.std, "finite, positive")):
        least = -math.inf if name == "mean" else 0
        numbers = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
        if values is None or (
            numbers and len(values) == channels and all(least < value < math.inf for value in values)
        ):
            continue
        raise ValueError(
            f"{source}: expected {name} to be {channels} {kind} numbers, one per channel, got {describe(values)}"
        )


def matched_tensors(model: nn.Module, file: CheckpointFile, kind: Format) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors by the model's names, and the names of those in the file that are ignored; others are refused."""
    expected = model.state_dict()
    sources = {name: kind.source(name) for name in expected}
    left_over = sorted(file.tensors.keys() - set(sources.values()))
    ignored = [name for name in left_over if re.fullmatch(kind.ignored, name)]
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
    told = [f"{len(names)} {problem}: {shortened(names)}" for problem, names in problems.items() if names]
    if told:
        raise ValueError(
            f"{file.path}: expected the tensors of a {kind.name} checkpoint, got {'; '.join(told)}{kind.otherwise}"
        )
    if not kind.keeps_dtypes:
        floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        widest = functools.reduce(torch.promote_types, floating)
        tensors = {name: x.to(widest) if x.is_floating_point() else x for name, x in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, ignored
