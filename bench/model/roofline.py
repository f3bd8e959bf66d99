"""The least time that a model can take on a machine, part by part: its FLOPs at the rate of a matmul, or its bytes at that of a copy.

Parts run one after the other. Within a part nothing goes through memory but its parameters, once, and the tokens it takes and leaves;
so this is a bound that nobody reaches, not a forecast. Recorded decisions, thresholds and the exits' predictions are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from step_kernels import SupertokenLayout
from step_kernels.model import StepSegmenter, Trace, count_flops
from step_kernels.model.vit import Block

POLICY, EMBED, ATTENTION, LINEARS, EXITS, DECODER, TAIL = (
    "policy",
    "merge and embed",
    "attention",
    "linears and norms",
    "exits",
    "decoder",
    "tail",
)
FRONT = (POLICY, EMBED)
# Tokens that a block takes and leaves: attention q, k, v and its output; the rest of a block the tokens, q, k, v, attention's output,
# the tokens again.
IN_ATTENTION, IN_LINEARS = 4, 6


@dataclass(frozen=True)
class Work:
    """What one part has to do for a batch.

    Attributes:
        part: name.
        flops: 1 MAC = 2 FLOPs.
        moved_bytes: see the module's text.
    """

    part: str
    flops: float
    moved_bytes: float

    def floor_ms(self, rates: Mapping[str, float]) -> float:
        """Milliseconds at rates as `bench.model.machine.rates` gives them."""
        multiplying = self.flops / rates["matmul_teraflops_per_second"] / 1e9
        moving = self.moved_bytes / rates["copy_gigabytes_per_second"] / 1e6
        return max(multiplying, moving)


def work_of(model: StepSegmenter, images: torch.Tensor, trace: Trace) -> tuple[Work, ...]:
    """The parts of one call on these images at these decisions; parts that the model does not have are left out."""
    encoder, vit, size = model.encoder, model.encoder.vit, images.element_size()
    dense = encoder.policy is None and not trace.stages and _is_uniform(trace.layout)
    flops = count_flops(model, tuple(images.shape), None if dense else trace)
    layouts = [trace.layout_of(number) for number in range(1, vit.depth + 1)]
    tokens = sum(layout.num_tokens for layout in layouts)  # summed over the blocks
    attention = 4 * vit.embed_dim * sum(_squares(layout) for layout in layouts)
    row = vit.embed_dim * size
    heads = encoder.exit_heads()
    exits = sum(_bytes(heads[stage.block]) + stage.halted.shape[0] * row for stage in trace.stages)
    grid = trace.layout.grid
    canvas = model.num_classes * grid[0] * grid[1] * images.shape[0] * size
    labels = images.shape[0] * images.shape[2] * images.shape[3] * (1 if model.num_classes <= 256 else 4)
    left = trace.final_layout.num_tokens
    blocks = sum(map(_bytes, cast(Iterable[Block], vit.blocks))) + _bytes(vit.norm) + left * row
    embedding = _bytes(vit.patch_embed) + images.nbytes + layouts[0].num_tokens * row
    parts = (
        Work(POLICY, flops.policy, 0 if flops.policy == 0 else images.nbytes + _bytes(encoder.policy)),
        Work(EMBED, flops.embed, embedding),
        Work(ATTENTION, attention, IN_ATTENTION * tokens * row),
        Work(LINEARS, flops.blocks - attention, IN_LINEARS * tokens * row + blocks),
        Work(EXITS, flops.exits, exits),
        Work(DECODER, flops.decoder, _bytes(model.decoder) + left * row + canvas),
        Work(TAIL, 0, canvas + labels),
    )
    return tuple(part for part in parts if part.flops or part.moved_bytes)


def mean_work(calls: Sequence[Sequence[Work]]) -> tuple[Work, ...]:
    """The mean over calls of the same parts."""
    return tuple(
        Work(same[0].part, sum(one.flops for one in same) / len(same), sum(one.moved_bytes for one in same) / len(same))
        for same in zip(*calls, strict=True)
    )


def floor_ms(work: Sequence[Work], rates: Mapping[str, float]) -> float:
    """Of all parts, one after the other."""
    return sum(part.floor_ms(rates) for part in work)


def as_json(work: Sequence[Work], rates: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Part -> gigaflops, megabytes and floor_ms of a batch."""
    return {
        part.part: {
            "gigaflops": part.flops / 1e9,
            "megabytes": part.moved_bytes / 1e6,
            "floor_ms": part.floor_ms(rates),
        }
        for part in work
    }


def _is_uniform(layout: SupertokenLayout) -> bool:
    rows, cols = layout.grid
    return layout.num_tokens == layout.batch_size * (rows * cols + layout.num_prefix)


def _squares(layout: SupertokenLayout) -> int:
    return int(layout.lengths().long().square().sum())


def _bytes(module: Any) -> int:
    return sum(parameter.nbytes for parameter in module.parameters()) if isinstance(module, nn.Module) else 0
