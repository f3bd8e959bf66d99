"""The config of a model as plain JSON values, and the model of such a config: what `save_checkpoint` writes beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import nn

from ..blocks import Block
from ..encoder import StepEncoder
from ..heads.atm import AtmDecoder, AtmExit, AtmHead
from ..heads.decoders import Decoder, LinearDecoder, MaskTransformerDecoder
from ..heads.exits import CosineExit, ExitHead, LinearExit
from ..policies.base import Policy, QuotaPolicy, VariancePolicy
from ..policies.cts import CTSPolicy
from ..policies.net import PolicyNet
from ..segmenter import StepSegmenter
from ..vit import ViT, ViTConfig
from .mmseg_vit import MmsegViT

__all__ = ["FORMAT", "build_model", "check_version", "model_config"]

FORMAT = "step-kernels"
FORMAT_VERSION = 1

Config = dict[str, Any]


def model_config(model: StepSegmenter | StepEncoder) -> Config:
    """What `build_model` needs to build ``model`` again, but for its tensors.

    Raises:
        NotImplementedError: a part of a class that has no entry here, by its name.
        ValueError: a part that its class and sizes do not describe: a folded policy, a changed epsilon.
    """
    encoder = model.encoder if isinstance(model, StepSegmenter) else model
    config: Config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vit": part_config("vit", encoder.vit, VITS),
        "resample": encoder.resample,
        "policy": None if encoder.policy is None else part_config("policy", encoder.policy, POLICIES),
        "exits": {
            str(number): part_config(f"exits[{number}]", head, EXITS) for number, head in encoder.exit_heads().items()
        },
        "decoder": part_config("decoder", model.decoder, DECODERS) if isinstance(model, StepSegmenter) else None,
    }
    check_same_structure(model, build_model(config))
    return config


def build_model(config: Config) -> StepSegmenter | StepEncoder:
    """The model of a config, on the meta device: its parameters and buffers are still to be assigned.

    Raises:
        ValueError: an entry that is missing, unknown, or refused by the class it describes.
        ImportError: a part needs an optional package that is missing.
    """
    with torch.device("meta"):
        try:
            exits = {
                int(number): build_part(f"exits[{number}]", spec, EXITS) for number, spec in config["exits"].items()
            }
            encoder = StepEncoder(
                cast(ViT, build_part("vit", config["vit"], VITS)),
                None if config["policy"] is None else build_part("policy", config["policy"], POLICIES),
                cast("dict[int, ExitHead]", exits),
                resample=config["resample"],
            )
            if config["decoder"] is None:
                return encoder
            return StepSegmenter(encoder, cast(Decoder, build_part("decoder", config["decoder"], DECODERS)))
        except KeyError as error:
            raise ValueError(f"config: expected an entry {error}, got none") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"config: expected the arguments of the parts, got others: {error}") from error


def part_config(name: str, part: nn.Module, kinds: Kinds) -> Config:
    """Class and sizes of one part; exactly its class, as a subclass may compute something else."""
    for kind, (cls, sizes, _) in kinds.items():
        if type(part) is cls:
            return {"kind": kind, **sizes(part)}
    raise NotImplementedError(
        f"{name}: expected one of {', '.join(kinds)}, which a checkpoint can describe, got {type(part).__name__}"
    )


def build_part(name: str, spec: Config, kinds: Kinds) -> nn.Module:
    """The part that ``spec`` describes."""
    kind = spec["kind"]
    if kind not in kinds:
        raise ValueError(f"config: expected {name} to be one of {', '.join(kinds)}, got {kind!r}")
    return kinds[kind][2](**{key: value for key, value in spec.items() if key != "kind"})


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


def vit_sizes(vit: nn.Module) -> Config:
    return asdict(cast(ViT, vit).config)


def vit_builder(cls: type[ViT]) -> Callable[..., nn.Module]:
    def build(**sizes: Any) -> ViT:
        img_size = sizes.pop("img_size")
        return cls(ViTConfig(img_size=tuple(img_size) if isinstance(img_size, list) else img_size, **sizes))

    return build


def policy_net_sizes(policy: nn.Module) -> Config:
    net = cast(PolicyNet, policy)
    stem = net.trunk[0][0]  # type: ignore[index]
    return {
        "sides": list(net.sides),
        "input_scale": net.input_scale,
        "width": stem.out_channels,
        "in_chans": stem.in_channels,
    }


def quota_sizes(policy: nn.Module) -> Config:
    quota = cast(QuotaPolicy, policy)
    return {"count": quota.count, "scorer": part_config("policy's scorer", quota.scorer, POLICIES)}


def build_quota(count: int, scorer: Config) -> nn.Module:
    return QuotaPolicy(cast(Policy, build_part("policy's scorer", scorer, POLICIES)), count)


def exit_sizes(head: nn.Module) -> Config:
    return {name: getattr(head, name) for name in ("dim", "num_classes", "keep_per_class")}


def linear_sizes(decoder: nn.Module) -> Config:
    return {name: getattr(decoder, name) for name in ("dim", "num_classes")}


def mask_transformer_sizes(decoder: nn.Module) -> Config:
    blocks = list(cast(Iterable[Block], decoder.blocks))
    num_heads = blocks[0].attn.num_heads if blocks else None
    return {**linear_sizes(decoder), "depth": len(blocks), "num_heads": num_heads}


def atm_head_sizes(part: nn.Module) -> Config:
    head = cast(AtmHead, part.head)
    return {"depth": len(head.layers), "num_heads": head.layers[0].self_attn.num_heads, "width": head.q.embedding_dim}


# By name: the class, its sizes as JSON values, and what builds it from them. Thresholds are tensors, not sizes.
Kinds = dict[str, tuple[type[nn.Module], Callable[[nn.Module], Config], Callable[..., nn.Module]]]
VITS: Kinds = {cls.__name__: (cls, vit_sizes, vit_builder(cls)) for cls in (ViT, MmsegViT)}
POLICIES: Kinds = {
    "VariancePolicy": (
        VariancePolicy,
        lambda policy: {"sides": list(cast(VariancePolicy, policy).sides)},
        lambda sides: VariancePolicy(0.0, sides),
    ),
    "PolicyNet": (PolicyNet, policy_net_sizes, PolicyNet),
    "CTSPolicy": (CTSPolicy, lambda policy: {}, CTSPolicy),
    "QuotaPolicy": (QuotaPolicy, quota_sizes, build_quota),
}
EXITS: Kinds = {
    **{cls.__name__: (cls, exit_sizes, cls) for cls in (LinearExit, CosineExit)},
    "AtmExit": (AtmExit, lambda head: {**exit_sizes(head), **atm_head_sizes(head)}, AtmExit),
}
DECODERS: Kinds = {
    "LinearDecoder": (LinearDecoder, linear_sizes, LinearDecoder),
    "MaskTransformerDecoder": (MaskTransformerDecoder, mask_transformer_sizes, MaskTransformerDecoder),
    "AtmDecoder": (AtmDecoder, lambda decoder: {**linear_sizes(decoder), **atm_head_sizes(decoder)}, AtmDecoder),
}


def check_version(config: Config, source: object) -> None:
    """Refuse a config of another version of the format."""
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{source}: expected format_version {FORMAT_VERSION}, got {config.get('format_version')!r}: "
            "written by another version of step-kernels"
        )
