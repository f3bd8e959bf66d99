"""What commands on labelled pictures begin with: the model, and the data of ``--data``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from step_kernels_cli import UsageError

from ...extras import import_extra, shown
from ..checkpoints import load_checkpoint
from ..checkpoints.formats import IMAGENET
from ..encoder import StepEncoder
from ..heads.decoders import Decoder, LinearDecoder, MaskTransformerDecoder
from ..heads.exits import LinearExit
from ..info import CheckpointInfo
from ..policies.net import PolicyNet
from ..segmenter import StepSegmenter
from ..train.augment import Prepared
from ..train.augment import batches as stacked_batches
from ..train.data import LabelledPictures
from ..train.scenes import Scenes
from .pictures import find_pictures, read_picture

__all__ = ["batches", "initial", "normalised", "open_data", "segmenter_of", "trained"]

CLASSES = {"cityscapes": 19, "ade20k": 150}  # that the layouts' label rules leave


def open_data(options: argparse.Namespace, num_classes: int, split: str | None) -> Any:
    """The split of ``--data``: a folder, or ``scenes:COUNT:SIZE:SEED``."""
    if options.data is None:
        raise UsageError("--data is needed")
    if options.data.split(":")[0] == "scenes":
        try:
            count, size, seed = [int(word) for word in options.data.split(":")[1:]]
            scenes = Scenes(count, size, seed)
        except ValueError as error:
            raise UsageError(f"--data expects a folder, or scenes:COUNT:SIZE:SEED, got {options.data!r}") from error
        if num_classes < len(scenes.classes) or not count:
            raise UsageError(
                f"--data {options.data}: {count} scenes of {len(scenes.classes)} classes, not {num_classes}"
            )
        return scenes
    named = {"layout": options.layout, "ignore_index": options.ignore_index}
    try:
        return LabelledPictures(options.data, split, num_classes=num_classes, **named)
    except (OSError, ValueError) as error:
        raise UsageError(f"--data: {error}") from None


def trained(options: argparse.Namespace, device: torch.device) -> StepSegmenter:
    """`segmenter_of` on its device, with a normalisation."""
    model = segmenter_of(options)
    model.info = normalised(model.info, options, options.checkpoint)
    return model.to(device, None if options.dtype is None else getattr(torch, options.dtype))


def segmenter_of(options: argparse.Namespace) -> StepSegmenter:
    """The segmenter of ``options.checkpoint``."""
    model = loaded(options.checkpoint, options)
    if not isinstance(model, StepSegmenter):
        raise UsageError(f"{options.checkpoint} is a {model.info.format} checkpoint without decoder: it has no classes")
    return model


def initial(options: argparse.Namespace) -> StepSegmenter:
    """The model of ``--init`` with the parts that it lacks, at random: decoder, exits, policy."""
    model = from_timm(options) if options.init.startswith("timm:") else loaded(Path(options.init), options)
    encoder = model.encoder if isinstance(model, StepSegmenter) else model
    info = normalised(model.info, options, options.init)
    torch.manual_seed(options.seed)
    vit, exits = encoder.vit, encoder.exit_heads()
    num_classes = options.classes or (model.num_classes if isinstance(model, StepSegmenter) else 0)
    num_classes = num_classes or CLASSES.get(options.layout or "", 0)
    if not num_classes:
        raise UsageError(f"--classes is needed, as {options.init} has no decoder that tells")
    decoder: Decoder
    if isinstance(model, StepSegmenter) and model.num_classes == num_classes:
        decoder = model.decoder
    else:
        kind = {"linear": LinearDecoder, "mask": MaskTransformerDecoder}[options.decoder]
        decoder, exits, info = kind(vit.embed_dim, num_classes), {}, replace(info, classes=None, palette=None)
    for number in options.exits or ():
        exits.setdefault(number, LinearExit(vit.embed_dim, num_classes))
    policy = encoder.policy
    try:
        if policy is None and (options.stage == "policy" or options.policy):
            policy = PolicyNet(options.sides or (2, 4, 8, 16))
        made = StepSegmenter(StepEncoder(vit, policy, exits, resample=encoder.resample), decoder)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    made.info = info
    return made.float()


def loaded(path: Path, options: argparse.Namespace) -> StepSegmenter | StepEncoder:
    """The file's model; what the file does not tell, the words do."""
    try:
        return load_checkpoint(path, **hints_of(options))
    except (TypeError, ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def hints_of(options: argparse.Namespace) -> Any:
    return {name: getattr(options, name) for name in ("img_size", "num_heads", "quota", "prefix")}


def from_timm(options: argparse.Namespace) -> StepSegmenter | StepEncoder:
    """A plain ViT of timm's with its pretrained weights, as `load_checkpoint` reads them."""
    for name, hint in hints_of(options).items():
        if hint is not None:
            raise UsageError(f"--init {options.init} tells all sizes: it takes no --{name.replace('_', '-')}")
    timm, files = import_extra("timm", "timm", "timm"), import_extra("safetensors.torch", "safetensors", "checkpoints")
    try:
        model = timm.create_model(options.init.removeprefix("timm:"), pretrained=True)
        with tempfile.TemporaryDirectory() as folder:
            files.save_file(model.state_dict(), path := Path(folder) / "timm.safetensors")
            encoder = load_checkpoint(path, num_heads=model.blocks[0].attn.num_heads)
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise UsageError(f"--init {options.init}: {error}") from None
    told = model.pretrained_cfg
    encoder.info = replace(encoder.info, mean=tuple(told["mean"]), std=tuple(told["std"]))
    return encoder


def normalised(info: CheckpointInfo, options: argparse.Namespace, path: object) -> CheckpointInfo:
    """Mean and standard deviation as given, else as the file tells, else ImageNet's; UsageError where these would be wrong."""
    mean, std = options.mean or info.mean, options.std or info.std
    if info.stretch and None in (mean, std):
        raise UsageError(
            f"--mean and --std are needed, as {path} does not tell them: those of its training config, "
            "divided by 255 (0.5,0.5,0.5 in mmsegmentation's own Segmenter configs)"
        )
    return replace(info, mean=mean or IMAGENET["mean"], std=std or IMAGENET["std"])


class Unlabelled(Dataset[tuple[Tensor, Tensor]]):
    """Pictures alone; their labels are zeros that nobody reads."""

    def __init__(self, folder: str) -> None:
        self.pictures = find_pictures([folder])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        path = self.pictures[number]
        try:
            picture = torch.from_numpy(read_picture(path).transpose(2, 0, 1).copy())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return picture, torch.zeros(picture.shape[1:], dtype=torch.uint8)


def batches(segmenter: StepSegmenter, data: Any, batch: int, what: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(images, labels or None) on the segmenter's device."""
    parameter, info = next(segmenter.parameters()), segmenter.info
    prepared = Prepared(data, info.mean or (), info.std or ())
    for images, labels in shown(stacked_batches(prepared, batch), what):
        known = None if isinstance(data, Unlabelled) else labels.to(parameter.device)
        yield images.to(parameter.device, parameter.dtype), known
