"""FLOPs of a model by its parts, as ``torch.utils.flop_counter`` counts them: matmuls and convolutions, 1 MAC = 2 FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, describe
from .encoder import StepEncoder
from .segmenter import StepSegmenter
from .trace import Trace

__all__ = ["FlopCount", "count_flops", "counted_run"]


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward pass over a batch, by part; ``stages``: the same up to the first exit's decision, the next one's, and the end."""

    policy: int
    embed: int
    blocks: int
    exits: int
    decoder: int
    stages: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.policy + self.embed + self.blocks + self.exits + self.decoder


@torch.no_grad()
def count_flops(segmenter: StepSegmenter, images_shape: Sequence[int], trace: Trace | None = None) -> FlopCount:
    """What ``segmenter`` computes on images of this shape; one forward pass, run on blank images.

    Prefix tokens count wherever they are computed on: everywhere but in the dense model's patch embedding.

    Args:
        segmenter: the model.
        images_shape: (B, C, H, W), before padding.
        trace: the run's decisions; the policy that took them counts, if there is one. None: the dense model, without policy
            and exits, every patch a token.

    Raises:
        ValueError: the shape is not that of a batch of images, the parameters are on the meta device, or the trace is of
            other images, another encoder or device.
        TypeError: an argument of a wrong type.
    """
    if not isinstance(segmenter, StepSegmenter):
        raise TypeError(f"segmenter: expected a StepSegmenter, got {type(segmenter).__name__}")
    if trace is not None and not isinstance(trace, Trace):
        raise TypeError(f"trace: expected a Trace or None, got {describe(trace)}")
    if not isinstance(images_shape, (tuple, list)):
        raise TypeError(f"images_shape: expected (B, C, H, W), got {describe(images_shape)}")
    if len(images_shape) != 4:
        raise ValueError(f"images_shape: expected (B, C, H, W), got {tuple(images_shape)}")
    shape = [check_int(f"images_shape[{i}]", size, minimum=1) for i, size in enumerate(images_shape)]
    vit, weight = segmenter.encoder.vit, segmenter.encoder.vit.embedding.weight
    if shape[1] != weight.shape[1]:
        raise ValueError(f"images_shape: expected {weight.shape[1]} channels as vit has, got {shape[1]}")
    if weight.is_meta:
        raise ValueError("segmenter: expected parameters with values, as it is run, got some on the meta device")
    if trace is not None:
        return counted_run(segmenter, weight.new_zeros(shape), trace)[0]
    dense, _, _ = counted_run(StepSegmenter(StepEncoder(vit), segmenter.decoder), weight.new_zeros(shape))
    prefix = 2 * shape[0] * vit.num_prefix * weight.numel()
    return replace(dense, embed=dense.embed - prefix, stages=(dense.total - prefix,))


@torch.no_grad()
def counted_run(
    segmenter: StepSegmenter, images: Tensor, replay: Trace | None = None
) -> tuple[FlopCount, Tensor, Trace]:
    """A forward pass in exact mode: its FLOPs, its scores and its decisions. Arguments: those of `StepSegmenter.forward`."""
    encoder, vit = segmenter.encoder, segmenter.encoder.vit
    embed, now = counted(encoder.start, images, replay)
    policy = blocks = exits = 0
    if encoder.policy is not None:
        arguments = {"patch_size": vit.patch_size, "num_prefix": vit.num_prefix}
        policy, _ = counted(encoder.policy.eval(), now.run.pixels, **arguments)
        embed -= policy if replay is None else 0  # a replay asks no policy
    heads, ends = encoder.exit_heads(), list[int]()
    for number in range(1, vit.depth + 1):
        flops, now.tokens = counted(vit.packed_block, number, now.tokens, now.inputs)
        blocks += flops
        if number in heads:
            exits += counted(encoder.take_exit, now, number, heads[number])[0]
            ends.append(policy + embed + blocks + exits)
    now.tokens = vit.packed_norm(now.tokens, now.inputs.layout)
    decoder, scores = counted(segmenter.decoder.complete, now.tokens, now.inputs.layout, now.canvas)
    ends.append(policy + embed + blocks + exits + decoder)
    stages = tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
    return FlopCount(policy, embed, blocks, exits, decoder, stages), scores, Trace(now.merged, tuple(now.stages))


def counted(call: Callable[..., Any], *args: Any, **named: Any) -> tuple[int, Any]:
    """FLOPs of a call, and its result."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # which imports Triton

    from .. import flops  # noqa: F401  # the ops' formulas

    sdpa_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # PyTorch knows the others
    formula = {sdpa_on_cpu: lambda q, k, v, *args, **named: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        result = call(*args, **named)
    return counter.get_total_flops(), result
