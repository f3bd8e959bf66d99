"""A model as plain JSON values, and the model of such values: what `save_checkpoint` writes beside the tensors.

A part is the name of its class and the arguments of its constructor, which it keeps as attributes of the same names. What
it keeps as a tensor (a threshold) comes with the tensors.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..encoder import StepEncoder
from ..heads.atm import AtmDecoder, AtmExit
from ..heads.decoders import LinearDecoder, MaskTransformerDecoder
from ..heads.exits import CosineExit, LinearExit
from ..policies.base import QuotaPolicy, VariancePolicy
from ..policies.cts import CTSPolicy
from ..policies.net import PolicyNet
from ..segmenter import StepSegmenter
from ..vit import ViT, ViTConfig
from .formats import OURS, Config, MmsegViT

__all__ = ["FORMAT_VERSION", "as_tuple", "build_model", "model_config"]

FORMAT_VERSION = 1

PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "vit": (ViT, MmsegViT),
    "policy": (VariancePolicy, PolicyNet, CTSPolicy, QuotaPolicy),
    "exits": (LinearExit, CosineExit, AtmExit),
    "decoder": (LinearDecoder, MaskTransformerDecoder, AtmDecoder),
}


def model_config(model: StepSegmenter | StepEncoder) -> Config:
    """What `build_model` needs to build ``model`` again, but for its tensors.

    NotImplementedError names a part whose class is not in `PARTS`, ValueError one that its class would build otherwise.
    """
    encoder, decoder = (model.encoder, model.decoder) if isinstance(model, StepSegmenter) else (model, None)
    config: Config = {
        "format": OURS.name,
        "format_version": FORMAT_VERSION,
        "vit": part_config("vit", encoder.vit),
        "resample": encoder.resample,
        "policy": None if encoder.policy is None else part_config("policy", encoder.policy),
        "exits": {str(number): part_config("exits", head) for number, head in encoder.exit_heads().items()},
        "decoder": None if decoder is None else part_config("decoder", decoder),
    }
    check_same_structure(model, build_model(config))
    return config


def build_model(config: Config) -> StepSegmenter | StepEncoder:
    """The model of a config, on the meta device: its parameters and buffers are still to be assigned.

    ValueError names an entry that is missing, unknown, or refused by the class that it describes.
    """
    with torch.device("meta"):
        try:
            policy = None if config["policy"] is None else build_part("policy", config["policy"])
            exits = {int(number): build_part("exits", part) for number, part in config["exits"].items()}
            encoder = StepEncoder(build_part("vit", config["vit"]), policy, exits, resample=config["resample"])
            decoder = config["decoder"]
            return encoder if decoder is None else StepSegmenter(encoder, build_part("decoder", decoder))
        except KeyError as error:
            raise ValueError(f"config: expected an entry {error}, got none") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"config: expected the arguments of the parts, got others: {error}") from error


def part_config(role: str, part: nn.Module) -> Config:
    """Class and arguments of one part; exactly its class, as a subclass may compute something else."""
    kind, known = type(part).__name__, ", ".join(cls.__name__ for cls in PARTS[role])
    if type(part) not in PARTS[role]:
        raise NotImplementedError(f"{role}: expected one of {known}, which a checkpoint can describe, got {kind}")
    config: Config = {"kind": kind}
    if isinstance(part, ViT):
        return config | asdict(part.config)
    for argument in inspect.signature(type(part)).parameters:
        value = getattr(part, argument)
        if not isinstance(value, Tensor):
            config[argument] = part_config(role, value) if isinstance(value, nn.Module) else value
    return config


def build_part(role: str, config: Config) -> Any:
    """The part that ``config`` describes."""
    arguments = {key: as_tuple(value) for key, value in config.items() if key != "kind"}
    kinds = {cls.__name__: cls for cls in PARTS[role]}
    kind = kinds.get(config["kind"])
    if kind is None:
        raise ValueError(f"config: expected {role} to be one of {', '.join(kinds)}, got {config['kind']!r}")
    if issubclass(kind, ViT):
        return kind(ViTConfig(**arguments))
    if kind is QuotaPolicy:
        arguments["scorer"] = build_part(role, arguments["scorer"])
    if kind is VariancePolicy:
        arguments["threshold"] = 0.0  # a tensor, still to come
    return kind(**arguments)


def as_tuple(value: object) -> Any:
    """JSON's lists as tuples, at every depth."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def check_same_structure(model: nn.Module, twin: nn.Module) -> None:
    """Refuse a model that its config does not describe: another tensor, shape, epsilon or number of heads in its twin."""
    own, built = structure(model), structure(twin)
    for name in [*own, *built]:
        if own.get(name) != built.get(name):
            raise ValueError(
                f"model: expected {name} to be as its class builds it ({built.get(name, 'absent')}), "
                f"got {own.get(name, 'absent')}: a changed part, or a policy's deployed copy"
            )


def structure(model: nn.Module) -> dict[str, str]:
    """Shapes of the state dict, and by name the settings of modules that no shape tells."""
    told = {name: f"shape {list(tensor.shape)}" for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        told |= {f"{name}.{key}": str(getattr(module, key)) for key in ("eps", "num_heads") if hasattr(module, key)}
    return told
