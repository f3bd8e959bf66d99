"""Merged + exits, composed from PyTorch's own parts: what a good user would write today without kernels of their own.

Merging, compaction and scattering as in `bench.kernels.plain` and `plain_exits`, matmuls by the vendor at exactly the live size,
attention by varlen_attn where it runs, else padded with a key mask. Sizes depend on the data, so the host waits for the device
after the merge and at each exit, and there is no CUDA graph; graphs in buckets of sizes are not in this comparison yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import LinearExit, Trace
from step_kernels.model.vit import Block

from ..kernels import plain, plain_attention, plain_exits
from ..kernels.contenders import compiled_when_called
from ..kernels.examples import Example
from ..kernels.operation import Unavailable
from ..settings import PATCH_SIZE
from .case import MERGED_EXITS, Case
from .graphs import fastest
from .registry import Built

POLICY_THRESHOLD = 0.5  # a PolicyNet's; its answer is dropped
EMBEDDINGS = {"pooled blocks": plain.embed_patches, "pooled images": plain.embed_patches_by_pooling}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def pytorch_parts(case: Case) -> Built:
    """Builder."""
    traces, first = case.decisions(MERGED_EXITS), case.inputs[0]
    embed = fastest(
        {
            name: functools.partial(_embed, function, case, first, traces[0].layout)
            for name, function in EMBEDDINGS.items()
        },
        case.device,
    )
    attention, prepare = best_attention(case)
    model = PartsModel(case, EMBEDDINGS[embed], prepare)
    spent = case.compiling.spent
    tail = compiled_when_called(plain.upsample_argmax, dynamic=False)
    problem = case.compiling.spend(lambda: tail(model.scores(first, traces[0]), (case.size, case.size)))
    tail = plain.upsample_argmax if problem else tail

    @torch.no_grad()
    def labels(number: int) -> Tensor:
        model.ask_policy(case.inputs[number])
        return cast(Tensor, tail(model.scores(case.inputs[number], traces[number]), (case.size, case.size)))

    return Built(
        labels,
        lambda number: model.scores(case.inputs[number], traces[number]),
        variant=f"{attention}, merged by {embed}, {'eager' if problem else 'compiled'} tail",
        compile_seconds=None if problem else case.compiling.spent - spent,
        note=problem,
    )


def best_attention(case: Case) -> tuple[str, Callable[[SupertokenLayout], Attend]]:
    """Its name, and what prepares it for a layout: the work of one stage, so it counts."""
    device_and_dtype = case.inputs[0]

    def varlen(layout: SupertokenLayout) -> Attend:
        return plain_attention.varlen(Example(layout, {"q": device_and_dtype}))

    def padded(layout: SupertokenLayout) -> Attend:
        return plain_attention.padded(Example(layout, {}))

    try:
        varlen(case.traces[0].layout)
    except Unavailable:
        return plain_attention.PADDED, padded
    return plain_attention.VARLEN, varlen


class PartsModel:
    """The forward pass; parameters are the case's."""

    def __init__(self, case: Case, embed: Callable[..., Tensor], prepare: Callable[[SupertokenLayout], Attend]) -> None:
        self._case, self._weights, self._embed, self._prepare = case, case.weights, embed, prepare

    @torch.no_grad()
    def ask_policy(self, images: Tensor) -> None:
        """The policy's work and the layout that follows from its scores; both dropped."""
        policy, vit = self._weights.policy, self._weights.vit
        scores = policy.scores(images, patch_size=PATCH_SIZE)
        sides = policy.sides[: len(scores)]
        plain.resolve_layout(scores, sides, POLICY_THRESHOLD, self._case.grid, vit.num_prefix)

    @torch.no_grad()
    def scores(self, images: Tensor, trace: Trace) -> Tensor:
        """Log-probabilities [batch, classes, rows, cols] at recorded decisions."""
        vit, classes = self._weights.vit, self._case.settings.classes
        layout, stages = trace.layout, {stage.block: stage for stage in trace.stages}
        tokens = _embed(self._embed, self._case, images, layout)
        canvas = tokens.new_zeros(layout.batch_size, *layout.grid, classes).permute(0, 3, 1, 2)
        attend = self._prepare(layout)
        for number, block in enumerate(cast(Iterable[Block], vit.blocks), start=1):
            tokens = transformer_block(block, tokens, attend)
            if number in stages:
                head = self._weights.exits[number]
                tokens, layout = exit_stage(head, tokens, canvas, layout, stages[number].halted)
                attend = self._prepare(layout)
        log_probabilities = self._weights.decoder.head(vit.norm(tokens)).log_softmax(1, dtype=torch.float32)
        is_block = layout.cells[:, 3] > 0
        return plain.scatter_into(canvas, log_probabilities, is_block, layout.cells)


def transformer_block(block: Block, tokens: Tensor, attend: Attend) -> Tensor:
    """A block on packed tokens [T, D]."""
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(tokens)).view(tokens.shape[0], 3, heads, -1).unbind(1)
    tokens = tokens + block.attn.proj(attend(q, k, v).flatten(1))
    return tokens + cast(Tensor, block.mlp(block.norm2(tokens)))


def exit_stage(
    head: LinearExit, tokens: Tensor, canvas: Tensor, layout: SupertokenLayout, halted: Tensor
) -> tuple[Tensor, SupertokenLayout]:
    """One exit whose confidences are computed and then replaced by the recorded decision: survivors and their layout."""
    log_probabilities = head.head(head.norm(tokens)).log_softmax(1, dtype=torch.float32)
    best, labels = log_probabilities.max(1)
    confidence = torch.where(halted, 1.0, 0.0 * best.exp())
    stage = plain_exits.compacted(
        confidence, labels, log_probabilities, tokens, canvas, layout.cu_seqlens, layout.cells, POLICY_THRESHOLD
    )
    cu_seqlens, cells, survivors = stage[0], stage[1], stage[-1]
    return survivors, SupertokenLayout(cu_seqlens, cells, layout.grid, layout.num_prefix, trimmed=True)


def _embed(function: Callable[..., Tensor], case: Case, images: Tensor, layout: SupertokenLayout) -> Tensor:
    vit = case.weights.vit
    embedding = vit.patch_embed.proj
    with torch.no_grad():
        positions, prefix = vit.grid_positions(case.grid), vit.prefix_tokens()
        return function(
            images, embedding.weight, embedding.bias, positions, prefix, layout.cu_seqlens, layout.cells, case.grid
        )
