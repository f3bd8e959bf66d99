"""FLOPs of a run from its token counts: matmuls and convolutions, attention's two matmuls included, 1 MAC = 2 FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import SupertokenLayout
from ..checks import check_int, describe
from .images import patch_grid
from .policies.base import Policy
from .segmenter import StepSegmenter
from .trace import Trace

__all__ = ["FlopCount", "count_flops"]


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward pass over a batch, by part."""

    policy: int
    embed: int
    blocks: int
    exits: int
    decoder: int

    @property
    def total(self) -> int:
        return self.policy + self.embed + self.blocks + self.exits + self.decoder


def count_flops(segmenter: StepSegmenter, images_shape: Sequence[int], trace: Trace | None = None) -> FlopCount:
    """What ``segmenter`` computes on images of this shape.

    Equals ``torch.utils.flop_counter`` on the same run. Prefix tokens count wherever they are computed on: everywhere but in
    the dense model's patch embedding. Reads the trace's token counts (host syncs).

    Args:
        segmenter: the model.
        images_shape: (B, C, H, W), before padding.
        trace: the run's decisions; the policy that took them counts, if there is one. None: the dense model, without policy
            and exits, every patch a token.

    Raises:
        ValueError: the shape is not that of a batch of images, or the trace is of other images or another encoder.
        TypeError: an argument of a wrong type, or the encoder's policy is no `Policy`.
    """
    if not isinstance(segmenter, StepSegmenter):
        raise TypeError(f"segmenter: expected a StepSegmenter, got {type(segmenter).__name__}")
    if trace is not None and not isinstance(trace, Trace):
        raise TypeError(f"trace: expected a Trace or None, got {describe(trace)}")
    if not isinstance(images_shape, (tuple, list)):
        raise TypeError(f"images_shape: expected (B, C, H, W), got {describe(images_shape)}")
    encoder, vit = segmenter.encoder, segmenter.encoder.vit
    if len(images_shape) != 4:
        raise ValueError(f"images_shape: expected (B, C, H, W), got {tuple(images_shape)}")
    batch_size, channels, height, width = (
        check_int(f"images_shape[{i}]", size, minimum=1) for i, size in enumerate(images_shape)
    )
    if channels != vit.embedding.in_channels:
        raise ValueError(f"images_shape: expected {vit.embedding.in_channels} channels as vit has, got {channels}")
    rows, cols = patch_grid(height, width, vit.patch_size)
    dense = trace is None
    if trace is None:
        trace = Trace(SupertokenLayout.uniform(batch_size, (rows, cols), num_prefix=vit.num_prefix))
    else:
        trace.check(
            batch_size=batch_size,
            grid=(rows, cols),
            num_prefix=vit.num_prefix,
            device=trace.layout.device,
            exits=tuple(encoder.exit_heads()),
        )
    padded = (batch_size, channels, rows * vit.patch_size, cols * vit.patch_size)
    policy = None if dense else encoder.policy
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            f"segmenter: expected its policy to be a Policy, whose FLOPs are known, got {type(policy).__name__}"
        )
    heads, numbers = encoder.exit_heads(), range(1, vit.depth + 1)
    return FlopCount(
        policy=0 if policy is None else policy.flops(padded, patch_size=vit.patch_size),
        embed=vit.embedding_flops(batch_size * rows * cols if dense else trace.layout.num_tokens),
        blocks=sum(vit.block_flops(number, trace.layout_of(number).lengths().tolist()) for number in numbers),
        exits=sum(heads[stage.block].flops(stage.halted.shape[0], batch_size) for stage in trace.stages),
        decoder=segmenter.decoder.flops(trace.final_layout.lengths().tolist(), num_prefix=vit.num_prefix),
    )
