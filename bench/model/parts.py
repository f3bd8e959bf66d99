"""Merged + exits, composed from PyTorch's own parts: what a good user would write today without kernels of their own.

Merging, compaction and scattering as in `bench.kernels.plain` and `plain_exits`, matmuls by the vendor at exactly the live size,
attention by varlen_attn where it runs, else padded with a key mask. Sizes depend on the data, so the host waits for the device
after the merge and at each exit, and everything is launched op by op; `bench.model.buckets` puts the blocks into CUDA graphs. The
position embeddings are pooled anew in each call, as in ours; a user whose weights stay could keep those tables.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import Trace
from step_kernels.model.vit import Block

from ..kernels import plain, plain_attention, plain_exits
from ..kernels.contenders import compiled_when_called
from ..kernels.examples import Example
from ..kernels.operation import Unavailable
from ..settings import PATCH_SIZE
from .case import MERGED_EXITS, Case, Weights
from .graphs import fastest
from .registry import Built

POLICY_THRESHOLD = 0.5  # a PolicyNet's; its answer is dropped
EMBEDDINGS = {"pooled blocks": plain.embed_patches, "pooled images": plain.embed_patches_by_pooling}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Segment:
    """The blocks up to an exit and its head, or after the last exit and the decoder: all row by row but for the attention."""

    blocks: tuple[Block, ...]
    norm: nn.Module
    head: nn.Module

    def __call__(self, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Packed tokens [T, D] -> those after the blocks, and their log-probabilities [T, classes]."""
        for block in self.blocks:
            tokens = transformer_block(block, tokens, attend)
        return tokens, self.head(self.norm(tokens)).log_softmax(1, dtype=torch.float32)


Run = Callable[[Segment, Tensor, SupertokenLayout], tuple[Tensor, Tensor]]  # a segment on the tokens of a layout


def pytorch_parts(case: Case) -> Built:
    """Builder."""
    attention, prepare = best_attention(case)

    def run(segment: Segment, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, Tensor]:
        return segment(tokens, prepare(layout))

    return PartsModel(case, run).built(attention)


def best_attention(case: Case) -> tuple[str, Callable[[SupertokenLayout], Attend]]:
    """Its name, and what prepares it for a layout: the work of one segment, so it counts."""
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
    """The forward pass at recorded decisions; parameters are the case's.

    Args:
        case: the comparison.
        run: how the segments run; what they return is read before it is called again.
    """

    def __init__(self, case: Case, run: Run) -> None:
        self._case, self._weights, self._run = case, case.weights, run
        self._segments = segments(case.weights)
        self._merged_by, self._embed = best_embedding(case)

    def built(self, variant: str, *, seconds: float = 0.0, held_bytes: int = 0, note: str | None = None) -> Built:
        """The contender, with the output tail compiled for it.

        Args:
            variant: what is special about it.
            seconds: that its preparation took, where there is one.
            held_bytes: device memory that it holds between calls.
            note: what a reader should know.
        """
        case, traces = self._case, self._case.decisions(MERGED_EXITS)
        size = (case.size, case.size)
        tail, tail_seconds, problem = compiled_tail(case, lambda: self.scores(case.inputs[0], traces[0]))

        @torch.no_grad()
        def labels(number: int) -> Tensor:
            self.ask_policy(case.inputs[number])
            return tail(self.scores(case.inputs[number], traces[number]), size)

        return Built(
            labels,
            lambda number: self.scores(case.inputs[number], traces[number]),
            variant=f"{variant}, merged by {self._merged_by}, {'eager' if problem else 'compiled'} tail",
            compile_seconds=(seconds + tail_seconds) or None,
            held_bytes=held_bytes,
            note="; ".join(filter(None, (note, problem))) or None,
        )

    @torch.no_grad()
    def ask_policy(self, images: Tensor) -> None:
        """The policy's work and the layout that follows from its scores; both dropped."""
        policy, vit = self._weights.policy, self._weights.vit
        scores = policy.scores(images, patch_size=PATCH_SIZE)
        sides = policy.sides[: len(scores)]
        plain.resolve_layout(scores, sides, POLICY_THRESHOLD, self._case.grid, vit.num_prefix)

    @torch.no_grad()
    def scores(self, images: Tensor, trace: Trace) -> Tensor:
        """Log-probabilities [batch, classes, rows, cols]."""
        layout = trace.layout
        tokens = self._embed(images, layout)
        canvas = tokens.new_zeros(layout.batch_size, *layout.grid, self._case.settings.classes).permute(0, 3, 1, 2)
        *with_exits, last = self._segments
        for segment, stage in zip(with_exits, trace.stages, strict=True):
            tokens, log_probabilities = self._run(segment, tokens, layout)
            tokens, layout = exit_stage(tokens, log_probabilities, canvas, layout, stage.halted)
        _, log_probabilities = self._run(last, tokens, layout)
        return plain.scatter_into(canvas, log_probabilities, layout.cells[:, 3] > 0, layout.cells)


def segments(weights: Weights) -> list[Segment]:
    """The model cut at its exits."""
    blocks, start, found = tuple(cast(Iterable[Block], weights.vit.blocks)), 0, []
    for end, head in sorted(weights.exits.items()):
        found.append(Segment(blocks[start:end], head.norm, head.head))
        start = end
    return [*found, Segment(blocks[start:], weights.vit.norm, weights.decoder.head)]


def transformer_block(block: Block, tokens: Tensor, attend: Attend) -> Tensor:
    """A block on packed tokens [T, D]."""
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(tokens)).view(tokens.shape[0], 3, heads, -1).unbind(1)
    tokens = tokens + block.attn.proj(attend(q, k, v).flatten(1))
    return tokens + cast(Tensor, block.mlp(block.norm2(tokens)))


def exit_stage(
    tokens: Tensor, log_probabilities: Tensor, canvas: Tensor, layout: SupertokenLayout, halted: Tensor
) -> tuple[Tensor, SupertokenLayout]:
    """One exit whose confidences are computed and then replaced by the recorded decision: survivors and their layout."""
    best, labels = log_probabilities.max(1)
    confidence = torch.where(halted, 1.0, 0.0 * best.exp())
    stage = plain_exits.compacted(
        confidence, labels, log_probabilities, tokens, canvas, layout.cu_seqlens, layout.cells, POLICY_THRESHOLD
    )
    cu_seqlens, cells, survivors = stage[0], stage[1], stage[-1]
    return survivors, SupertokenLayout(cu_seqlens, cells, layout.grid, layout.num_prefix, trimmed=True)


def compiled_tail(case: Case, scores: Callable[[], Tensor]) -> tuple[Callable[..., Tensor], float, str | None]:
    """Upsampling and argmax: the function, the seconds that its compilation took, and why it is eager, where it is.

    Compiled once for the contenders of one model and batch size.
    """
    key = ("tail", case.batch)
    if key not in case.weights.kept:
        # Always without gradients, or a caller with another mode would have it compiled again, outside of the budget.
        tail = torch.no_grad()(compiled_when_called(plain.upsample_argmax, dynamic=False))
        spent, example = (
            case.compiling.spent,
            scores(),
        )  # outside of the budget: what the model raises is none of the compiler's
        problem = case.compiling.spend(lambda: tail(example, (case.size, case.size)))
        seconds = 0.0 if problem else case.compiling.spent - spent
        case.weights.kept[key] = plain.upsample_argmax if problem else tail, seconds, problem
    kept: tuple[Callable[..., Tensor], float, str | None] = case.weights.kept[key]
    return kept


def best_embedding(case: Case) -> tuple[str, Callable[[Tensor, SupertokenLayout], Tensor]]:
    """The faster way to merge, raced once for the contenders of one model and batch size; its name, and images, layout -> tokens."""
    key = ("merging", case.batch)
    if key not in case.weights.kept:
        images, layout = case.inputs[0], case.traces[0].layout
        race = {name: functools.partial(_embed, way, case, images, layout) for name, way in EMBEDDINGS.items()}
        case.weights.kept[key] = fastest(race, case.device)
    name: str = case.weights.kept[key]
    return name, functools.partial(_embed, EMBEDDINGS[name], case)


def _embed(function: Callable[..., Tensor], case: Case, images: Tensor, layout: SupertokenLayout) -> Tensor:
    vit = case.weights.vit
    embedding = vit.patch_embed.proj
    with torch.no_grad():
        positions, prefix = vit.grid_positions(case.grid), vit.prefix_tokens()
        return function(
            images, embedding.weight, embedding.bias, positions, prefix, layout.cu_seqlens, layout.cells, case.grid
        )
