"""Merged + exits whose blocks are PyTorch's own parts; merging, exits and output tail stay ours, so that no rival is slow for those.

At exact sizes the vendor's matmuls and varlen_attn (where it runs, else padded SDPA with a key mask), op by op; the same with the blocks
in CUDA graphs that are recorded for buckets of sizes; and in static mode with grouped_mm, which reads the live count on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import ViT

from ..engine import Contender, NotRun
from ..layouts import Attend, Padding, has_varlen, varlen
from ..segmenters import DENSE, MERGED_EXITS, Segmenters
from .graphs import Graphed, largest_first

TILE = 128  # rows of a matmul's tile, and of attention's: finer buckets would save nothing
ROWS_WASTE, LONGEST_WASTE = 1 / 16, 1 / 4
Attention = Callable[[SupertokenLayout], Attend]
Linear = Callable[[Any, Tensor, SupertokenLayout], Tensor]  # layer, rows, their layout


def vendor_linear(layer: Any, x: Tensor, layout: SupertokenLayout) -> Tensor:
    return cast(Tensor, layer(x))


def grouped_linear(layer: Any, x: Tensor, layout: SupertokenLayout) -> Tensor:
    """One group, whose end is the live count on the device; PyTorch has no addition that stops there."""
    out: Tensor = F.grouped_mm(x, layer.weight.t()[None], offs=layout.cu_seqlens[-1:]) + layer.bias
    return out


class Prepared(NamedTuple):
    """What blocks on one layout share."""

    layout: SupertokenLayout
    attend: Attend


class PartsViT(ViT):
    """A ViT with the parameters of another one, whose blocks run on packed tokens through functions of PyTorch."""

    def __init__(self, vit: ViT, attention: Attention, linear: Linear = vendor_linear) -> None:
        nn.Module.__init__(self)
        self.config, self.cls_token, self.pos_embed = vit.config, vit.cls_token, vit.pos_embed
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.attention, self.linear = attention, linear

    def block_inputs(self, layout: SupertokenLayout, earlier: Any = None) -> Any:
        return Prepared(layout, self.attention(layout))

    def packed_block(self, number: int, tokens: Tensor, inputs: Any) -> Tensor:
        (layout, attend), block = inputs, self.blocks[number - 1]
        qkv = self.linear(block.attn.qkv, block.norm1(tokens), layout)
        q, k, v = qkv.view(tokens.shape[0], 3, block.attn.num_heads, -1).unbind(1)
        tokens = tokens + self.linear(block.attn.proj, attend(q, k, v).flatten(1), layout)
        hidden = F.gelu(self.linear(block.mlp.fc1, block.norm2(tokens), layout))
        return tokens + self.linear(block.mlp.fc2, hidden, layout)


class BucketedViT(PartsViT):
    """The blocks up to the exit, and those after it, as CUDA graphs, one for each bucket of (rows, longest image) that occurs.

    Padding never meets a live row: varlen_attn works on the rows that `cu_seqlens` names, and all else is row by row; attention's empty
    tiles end at once. All graphs read one input and share one pool: what one returns is read before the next one runs.
    """

    def __init__(self, own: Segmenters) -> None:
        super().__init__(own.weights.vit, lambda layout: varlen(layout.cu_seqlens, 0))
        (last,), self.uniform = own.weights.exits, own.decisions(DENSE)[0].layout
        self.segments = {1: last, last + 1: self.depth}
        # Zeros: rows that no call has filled yet are read as padding.
        self.tokens = own.inputs[0].new_zeros(bucket_of(self.uniform.capacity, ROWS_WASTE), self.embed_dim)
        self.cu_seqlens = torch.zeros_like(self.uniform.cu_seqlens)
        self.graphs: dict[tuple[int, int, int], Graphed] = {}
        self.live = self.rows = 0

    def packed_block(self, number: int, tokens: Tensor, inputs: Any) -> Tensor:
        if number not in self.segments:
            return tokens  # the graph of its segment has run it
        live, layout = tokens.shape[0], inputs.layout
        rows, longest = bucket_of(live, ROWS_WASTE), bucket_of(int(layout.lengths().max()), LONGEST_WASTE)
        key = number, rows, longest
        if key not in self.graphs:
            self.cu_seqlens.copy_(layout.cu_seqlens)  # whose rows the warm-up has
            segment = functools.partial(self.segment, *key)
            first = next(iter(self.graphs.values()), None)
            self.graphs[key] = Graphed(segment, self.tokens, self.cu_seqlens, beside=first)
        self.live, self.rows = self.live + live, self.rows + rows
        return cast(Tensor, self.graphs[key](tokens, layout.cu_seqlens)[:live])

    def segment(self, first: int, rows: int, longest: int) -> Tensor:
        """Its blocks on the graphs' input."""
        tokens, inputs = self.tokens[:rows], Prepared(self.uniform, varlen(self.cu_seqlens, longest))
        for number in range(first, self.segments[first] + 1):
            tokens = super().packed_block(number, tokens, inputs)
        return tokens


def op_by_op(own: Segmenters) -> Contender:
    """Sizes depend on the data, so the host waits for the device after the merge and at each exit."""
    attention, name = (by_varlen, "varlen_attn") if has_varlen(own.inputs[0]) else (by_padding, "padded SDPA")
    labels = own.eager(MERGED_EXITS, PartsViT(own.weights.vit, attention))
    return own.contender(MERGED_EXITS, labels, ours=False, note=f"{name}, op by op")


def by_grouped_mm(own: Segmenters) -> Contender:
    if not has_varlen(own.inputs[0]) or own.inputs[0].dtype != torch.bfloat16:
        raise NotRun("needs a CUDA device and bfloat16")
    return own.captured(MERGED_EXITS, PartsViT(own.weights.vit, by_varlen, grouped_linear))


def bucketed(own: Segmenters) -> Contender:
    if not has_varlen(own.inputs[0]):
        raise NotRun("needs a CUDA device and bfloat16 or float16")
    vit = BucketedViT(own)
    labels = own.eager(MERGED_EXITS, vit)
    for number in largest_first(own.traces):
        labels(number)
    note = f"varlen_attn, {len(vit.graphs)} CUDA graphs in buckets of sizes, {vit.rows / vit.live - 1:.1%} padding"
    held = vit.tokens.nbytes + sum(graph.held_bytes for graph in vit.graphs.values())
    return own.contender(MERGED_EXITS, labels, ours=False, note=note, held_bytes=held)


def bucket_of(count: int, waste: float) -> int:
    """The smallest bucket that holds `count`: a multiple of `TILE`, above it by at most `waste` of it or by less than one tile."""
    step = max(TILE, (1 << int(count * waste).bit_length()) >> 1)
    return -(-count // step) * step


def by_varlen(layout: SupertokenLayout) -> Attend:
    """Of an untrimmed layout, whose lengths the host does not know, with the longest that there can be."""
    return varlen(layout.cu_seqlens, int(layout.lengths().max()) if layout.trimmed else layout.max_seqlen)


def by_padding(layout: SupertokenLayout) -> Attend:
    return Padding(layout.lengths()).self_attend
