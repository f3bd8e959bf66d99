"""Merged + exits whose blocks are PyTorch's own parts; merging, exits and output tail stay ours, so that no rival is slow for those.

At exact sizes the vendor's matmuls and varlen_attn (where it runs, else padded SDPA with a key mask), op by op; the same with the blocks
in CUDA graphs that are recorded for buckets of sizes; and in static mode with grouped_mm, which reads the live count on the device.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import ViT
from step_kernels.model.graph.cuda_graph import GraphPool

from ..engine import Contender, NotRun
from ..segmenters import DENSE, MERGED_EXITS, Segmenters
from .graphs import Graphed, largest_first

TILE = 128  # rows of a matmul's tile, and of attention's: finer buckets would save nothing
ROWS_WASTE, LONGEST_WASTE = 1 / 16, 1 / 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [T, H, D]
Linear = Callable[..., Tensor]  # layer, rows, layout=


@dataclass(frozen=True)
class Prepared:
    """What blocks on one layout share."""

    layout: SupertokenLayout
    attend: Attend


class PartsViT(ViT):
    """A ViT with the parameters of another one, whose blocks run on packed tokens through functions of PyTorch."""

    def __init__(self, vit: ViT, linear: Linear, attention: Callable[[SupertokenLayout], Attend]) -> None:
        nn.Module.__init__(self)
        self.config, self.cls_token, self.pos_embed = vit.config, vit.cls_token, vit.pos_embed
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.linear, self.attention = linear, attention

    def block_inputs(self, layout: SupertokenLayout, earlier: Any = None) -> Any:
        return Prepared(layout, self.attention(layout))

    def packed_block(self, number: int, tokens: Tensor, inputs: Any) -> Tensor:
        linear = functools.partial(self.linear, layout=inputs.layout)
        return transformer_block(self.blocks[number - 1], tokens, linear, inputs.attend)


def transformer_block(block: Any, tokens: Tensor, linear: Linear, attend: Attend) -> Tensor:
    """A block on packed tokens [T, D]."""
    qkv = linear(block.attn.qkv, block.norm1(tokens))
    q, k, v = qkv.view(tokens.shape[0], 3, block.attn.num_heads, -1).unbind(1)
    tokens = tokens + linear(block.attn.proj, attend(q, k, v).flatten(1))
    return tokens + linear(block.mlp.fc2, F.gelu(linear(block.mlp.fc1, block.norm2(tokens))))


def pytorch_parts(segmenters: Segmenters) -> Contender:
    """Op by op. Sizes depend on the data, so the host waits for the device after the merge and at each exit."""
    lacking = varlen_lacks(segmenters)
    vit = PartsViT(segmenters.weights.vit, vendor_linear, by_padding if lacking else by_varlen)
    note = f"{'padded SDPA' if lacking else 'varlen_attn'}, op by op"
    return segmenters.contender(MERGED_EXITS, segmenters.eager(MERGED_EXITS, vit), ours=False, note=note)


def by_grouped_mm(segmenters: Segmenters) -> Contender:
    """Static mode: one group, whose end is the live count on the device.

    Raises:
        NotRun: no GPU, another dtype than bfloat16, or this PyTorch has none of it.
    """
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if lacking := varlen_lacks(segmenters):
        raise NotRun(lacking)
    if grouped_mm is None or segmenters.inputs[0].dtype != torch.bfloat16:
        raise NotRun("needs bfloat16 and torch.nn.functional.grouped_mm")

    def linear(layer: nn.Linear, x: Tensor, layout: SupertokenLayout) -> Tensor:
        out: Tensor = grouped_mm(x, layer.weight.t()[None], offs=layout.cu_seqlens[-1:])
        return (
            out + layer.bias
        )  # over the whole capacity: PyTorch has no such kernel that stops at a count on the device

    return segmenters.captured(MERGED_EXITS, PartsViT(segmenters.weights.vit, linear, by_varlen))


def bucketed(segmenters: Segmenters) -> Contender:
    """The blocks of each segment as one CUDA graph.

    Raises:
        NotRun: varlen_attn does not run here.
    """
    if lacking := varlen_lacks(segmenters):
        raise NotRun(lacking)
    vit = BucketedViT(segmenters)
    labels, traces = segmenters.eager(MERGED_EXITS, vit), segmenters.decisions(MERGED_EXITS)
    for number in largest_first(traces):
        labels(number)
    note = f"varlen_attn, {len(vit.graphs)} CUDA graphs in buckets of sizes, {vit.rows / vit.live - 1:.1%} padding"
    held = vit.tokens.nbytes + sum(graph.held_bytes for graph in vit.graphs.values())
    return segmenters.contender(MERGED_EXITS, labels, ours=False, note=note, held_bytes=held)


class BucketedViT(PartsViT):
    """Packed tokens are padded to the next bucket of (rows, longest image); its graph is recorded when it first occurs.

    Padding never meets a live row: varlen_attn works on the rows that `cu_seqlens` names, and all else is row by row. The longest image
    only sets attention's launch grid; empty tiles end at once. All graphs read one input, share one pool, and never run at once: what
    one returns is read before the next one runs.
    """

    def __init__(self, segmenters: Segmenters) -> None:
        super().__init__(segmenters.weights.vit, vendor_linear, lambda layout: varlen(layout.cu_seqlens, 0))
        ends, uniform = [*sorted(segmenters.weights.exits), self.depth], segmenters.decisions(DENSE)[0].layout
        self.segments = dict(zip([1, *(end + 1 for end in ends)], ends, strict=False))  # first block -> last
        # Zeros: rows that no call has filled yet are read as padding.
        self.tokens = segmenters.inputs[0].new_zeros(bucket_of(uniform.capacity, ROWS_WASTE), self.embed_dim)
        self.cu_seqlens = torch.zeros_like(uniform.cu_seqlens)
        self.graphs: dict[tuple[int, int, int], Graphed] = {}
        self.pool, self.live, self.rows = GraphPool(), 0, 0

    def packed_block(self, number: int, tokens: Tensor, inputs: Any) -> Tensor:
        if number not in self.segments:
            return tokens  # the graph of its segment has run it
        live, layout = tokens.shape[0], inputs.layout
        rows, longest = bucket_of(live, ROWS_WASTE), bucket_of(int(layout.lengths().max()), LONGEST_WASTE)
        self.tokens[:live].copy_(tokens)
        self.cu_seqlens.copy_(layout.cu_seqlens)
        key = number, rows, longest
        if key not in self.graphs:
            self.graphs[key] = Graphed(functools.partial(self.segment, *key), tokens.device, self.pool)
        self.live, self.rows = self.live + live, self.rows + rows
        return cast(Tensor, self.graphs[key]()[:live])

    def segment(self, first: int, rows: int, longest: int) -> Tensor:
        """Its blocks on the graphs' input."""
        tokens, attend = self.tokens[:rows], varlen(self.cu_seqlens, longest)
        for block in self.blocks[first - 1 : self.segments[first]]:
            tokens = transformer_block(block, tokens, vendor_linear, attend)
        return tokens


def bucket_of(count: int, waste: float) -> int:
    """The smallest bucket that holds `count`: a multiple of `TILE`, above it by at most `waste` of it or by less than one tile."""
    step = max(TILE, (1 << int(count * waste).bit_length()) >> 1)
    return -(-count // step) * step


def vendor_linear(layer: nn.Linear, x: Tensor, layout: SupertokenLayout | None = None) -> Tensor:
    return cast(Tensor, layer(x))


def varlen_lacks(segmenters: Segmenters) -> str | None:
    """Why varlen_attn does not run, or None."""
    if segmenters.device.type != "cuda" or segmenters.inputs[0].dtype not in (torch.bfloat16, torch.float16):
        return "needs a CUDA device and bfloat16 or float16"
    return None if importlib.util.find_spec("torch.nn.attention.varlen") else "needs torch.nn.attention.varlen"


def by_varlen(layout: SupertokenLayout) -> Attend:
    """Of an untrimmed layout, whose lengths the host does not know, with the longest that there can be."""
    return varlen(layout.cu_seqlens, int(layout.lengths().max()) if layout.trimmed else layout.max_seqlen)


def varlen(cu_seqlens: Tensor, longest: int) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    return lambda q, k, v: cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest))


def by_padding(layout: SupertokenLayout) -> Attend:
    """Pad, SDPA with a key mask, and back."""
    lengths = layout.lengths()
    shape = layout.batch_size, int(lengths.max())
    mask = torch.arange(shape[1], device=lengths.device) < lengths[:, None]
    rows = mask.flatten().nonzero().flatten()

    def attend(*packed: Tensor) -> Tensor:
        q, k, v = (
            x.new_zeros(mask.numel(), *x.shape[1:]).index_copy(0, rows, x).unflatten(0, shape).transpose(1, 2)
            for x in packed
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return out.transpose(1, 2).flatten(0, 1).index_select(0, rows)

    return attend
