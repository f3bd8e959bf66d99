"""Batch norm folded into the convolution before it, for networks that only infer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...checks import describe
from ...numerics import accumulator

__all__ = ["copy_tensors", "fold_structure", "folded_tensors", "named_tensors"]

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def fold_structure(module: nn.Module) -> None:
    """Make every ``Sequential(convolution, batch norm, ...)`` of ``module`` ``(convolution with bias, identity, ...)``.

    The identity keeps the names of everything else. Weights of convolutions become channels_last; their values, and those
    of the biases, are still to be filled in: see `folded_tensors`.
    """
    for unit in conv_norm_units(module).values():
        conv = cast(nn.Conv2d, unit[0])
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_empty(conv.out_channels))
        unit[1] = nn.Identity()
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight = nn.Parameter(torch.empty_like(part.weight, memory_format=torch.channels_last))


def folded_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a copy of ``module`` holds after `fold_structure`: its parameters and buffers by name, batch norm folded.

    Batch norm counts as in eval mode, by its running statistics, whatever mode ``module`` is in.
    """
    tensors = named_tensors(module)
    for name, unit in conv_norm_units(module).items():
        tensors[f"{name}.0.weight"], tensors[f"{name}.0.bias"] = folded_conv(unit[0], unit[1])
        for part in unit[1].state_dict():
            del tensors[f"{name}.1.{part}"]
    return tensors


def copy_tensors(targets: dict[str, Tensor], values: dict[str, Tensor], name: str) -> None:
    """Copy ``values`` into ``targets`` in place; nothing is copied unless all of them fit.

    Raises:
        ValueError: ``values`` (the argument ``name``) differ from ``targets`` in names, shapes, dtypes or devices.
    """
    if targets.keys() != values.keys():
        raise ValueError(
            f"{name}: expected the parts that this copy has, got further ones {sorted(values.keys() - targets.keys())}, "
            f"and missing ones {sorted(targets.keys() - values.keys())}"
        )
    for part, target in targets.items():
        value = values[part]
        if (value.shape, value.dtype, value.device) != (target.shape, target.dtype, target.device):
            raise ValueError(
                f"{name}: expected {part} {describe(target)} on {target.device} as this copy has, "
                f"got {describe(value)} on {value.device}"
            )
    with torch.no_grad():
        for part, target in targets.items():
            if values[part] is not target:
                target.copy_(values[part])


def conv_norm_units(module: nn.Module) -> dict[str, nn.Sequential]:
    """Each ``Sequential`` in ``module`` that begins with a convolution and its batch norm, by name."""
    return {
        name: unit
        for name, unit in module.named_modules()
        if isinstance(unit, nn.Sequential)
        and len(unit) > 1
        and isinstance(unit[0], nn.Conv2d)
        and isinstance(unit[1], NORMS)
    }


@torch.no_grad()
def folded_conv(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in the convolution's dtype, of the one convolution that equals both in eval mode."""
    weight, wide = cast(Tensor, conv.weight), accumulator(cast(Tensor, conv.weight).dtype)
    gain, shift, mean, variance = (
        cast(Tensor, tensor).to(wide) for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = gain * (variance + cast(float, norm.eps)).rsqrt()
    if conv.bias is not None:
        mean = mean - cast(Tensor, conv.bias).to(wide)
    folded = weight.to(wide) * scale.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), (shift - mean * scale).to(weight.dtype)
