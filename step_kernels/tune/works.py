"""What ``tune`` measures: each kernel with a table of rows, called through its registered op at the sizes of a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention_schedule
from ..attention_provider import why_not_varlen
from ..triton.attention import configs as attention
from ..triton.attention.launch import row_key
from ..triton.common import cells, tuned
from ..triton.common.launch import architecture, multiprocessors, power_of_2
from ..triton.common.operands import dtype_class, split_head_dim
from ..triton.halting import compaction, decision, gather, head
from ..triton.halting import launch as halting
from ..triton.linear import configs as linear
from ..triton.merge import patches
from ..triton.norm import launch as norm
from .measure import Outputs, Work
from .sizes import Sizes

ops = torch.ops.step_kernels
SPARE = 16  # rows past the tokens


def works(sizes: Sizes) -> Iterator[Work]:
    """Of all kernels, those that most of a model's time goes to first."""
    for work in (*_attention(sizes), *_linear(sizes), *_norm(sizes), *_exits(sizes), *_movers(sizes)):
        if len(work.candidates) > 1:
            yield work


def _calling(op: Callable[..., Any], *arguments: Any) -> Callable[[torch.dtype], Outputs]:
    """The op; in fp64 with its arguments in fp64."""

    @functools.cache
    def prepared(dtype: torch.dtype) -> list[Any]:
        wide = dtype == torch.float64
        return [x.to(dtype) if wide and isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]

    def call(dtype: torch.dtype) -> Outputs:
        found = op(*prepared(dtype))
        return tuple(x for x in found if x.numel()) if isinstance(found, tuple) else (found,)

    return call


def _attention(s: Sizes) -> Iterator[Work]:
    """Forward and backward: rows of their kernels, and PyTorch's kernels in place of all of a pass. NaN past the tokens must not leak."""
    width, target = s.dim // s.num_heads, architecture(s.device)
    what = f"{s.batch} images, {s.tokens} tokens, {s.num_heads} heads of {width}"
    packed = F.pad(s.random(s.tokens, 4, s.num_heads, width), (0, 0, 0, 0, 0, 0, 0, SPARE), value=math.nan)
    q, k, v, grad = packed.unbind(1)
    qkv = q, k, v
    metadata = s.cu_seqlens, None, None, attention_schedule(s.cu_seqlens, s.tokens + SPARE)

    def forward(*given: Any) -> Outputs:
        return tuple(x[: s.tokens] for x in ops.ragged_attention(*given)[:1])

    def backward(*given: Any) -> Outputs:
        return ops.ragged_attention_backward(*given)

    key, columns = row_key("attention_forward", q, s.cu_seqlens), sum(split_head_dim(width))
    other = [] if why_not_varlen(q, k, v, None, None) else [tuned.VARLEN]
    rows = attention.forward_candidates(target, s.dtype, columns, few="few" in key)
    yield Work(tuned.name_of(*key), [*rows, *other], _calling(forward, *qkv, *metadata, False, False, s.cells), what)
    out, lse = ops.ragged_attention(*qkv, *metadata, True, True)
    call = _calling(backward, grad, *qkv, out, lse, *metadata, s.cells)
    for kernel in ("attention_grad_kv", "attention_grad_q"):
        rows = attention.backward_candidates(kernel, target, s.dtype, columns)
        yield Work(tuned.name_of(kernel, dtype_class(s.dtype), columns), rows, call, what)
    if other:
        key = row_key("attention_backward", q, s.cu_seqlens)
        yield Work(tuned.name_of(*key), [tuned.TRITON, *other], call, what)


def _linear(s: Sizes) -> Iterator[Work]:
    """The four layers of a block, with their epilogues."""
    for inputs, outputs, activation, added in (
        (s.dim, 3 * s.dim, None, False),
        (s.dim, s.dim, None, True),
        (s.dim, s.hidden, "gelu", False),
        (s.hidden, s.dim, None, True),
    ):
        x, weight = s.random(s.tokens, inputs), s.random(outputs, inputs, seed=1) / inputs**0.5
        bias, residual = s.random(outputs, seed=2), s.random(s.tokens, outputs, seed=3) if added else None
        call = _calling(ops.ragged_linear, x, weight, bias, s.cu_seqlens, activation, None, residual, False, s.tokens)
        precision = linear.precision_of(s.dtype)
        default = linear.choose_tiles(architecture(s.device), precision, s.tokens, outputs, multiprocessors(s.device))
        key = tuned.name_of("linear", precision, inputs, outputs, power_of_2(s.tokens))
        rows = dict.fromkeys((default, *linear.candidates(architecture(s.device), precision)))
        yield Work(key, [*rows], call, f"{s.tokens} tokens, {inputs} to {outputs}")


def _norm(s: Sizes) -> Iterator[Work]:
    x, weight, bias = s.random(s.tokens, s.dim), s.random(s.dim, seed=1), s.random(s.dim, seed=2)
    call = _calling(ops.ragged_layer_norm, x, weight, bias, 1e-6, s.cu_seqlens, False)
    yield Work(tuned.name_of(*norm.row_key(x)), norm.forward_candidates(x), call, f"{s.tokens} tokens of {s.dim}")


def _exits(s: Sizes) -> Iterator[Work]:
    """A stage with a linear head, and the decision of others. Half of the tokens halt; each is clearly of one class, so that labels compare."""
    metadata, capacity = (s.layout.cu_seqlens, s.layout.cells), s.layout.capacity
    what = f"{capacity} tokens of {s.dim}, {s.classes} classes"
    chance = torch.Generator(s.device).manual_seed(0)
    weight = s.random(s.classes, s.dim)
    label = torch.randint(s.classes, (capacity,), generator=chance, device=s.device)
    forced = torch.rand(capacity, generator=chance, device=s.device) < 0.5
    tokens, weight = s.random(capacity, s.dim, seed=1) + weight[label], weight * (8 / s.dim)
    canvas = s.random(s.batch, s.grid, s.grid, s.classes).permute(0, 3, 1, 2)

    def stage(*given: Any) -> Outputs:
        return *ops.exit_head(*given[:-1], given[-1].zero_()), given[-1]

    norm_weight, norm_bias, bias = s.random(s.dim, seed=2), s.random(s.dim, seed=3) / 8, s.random(s.classes, seed=4) / 8
    parameters = norm_weight.abs(), norm_bias, weight, bias, 1e-6
    call = _calling(stage, tokens, *parameters, *metadata, 1.0, None, 0, forced, canvas)
    rows = head.candidates(s.classes, s.dim, s.dtype, architecture(s.device))
    yield Work(tuned.name_of(*halting.head_key(tokens, weight)), rows, call, what)
    yield Work(tuned.name_of(*halting.row_key("compact", canvas)), compaction.COMPACT_ROWS, call, what)
    scores = s.random(capacity, s.classes, seed=5)
    call = _calling(ops.halt_tokens, scores, *metadata, 0.1, None, True, 0, forced, scores, None)
    yield Work(tuned.name_of(*halting.row_key("decide", scores)), decision.DECIDE_ROWS, call, what)


def _movers(s: Sizes) -> Iterator[Work]:
    """What moves tokens and cells: the survivors of an exit, pixels and features into tokens, tokens onto a canvas."""
    metadata, capacity = (s.layout.cu_seqlens, s.layout.cells), s.layout.capacity
    what = f"{s.batch} images of {s.grid} x {s.grid} cells, {capacity} tokens"
    tokens, scores = s.random(capacity, s.dim), s.random(capacity, s.classes)
    features = s.random(s.batch, s.cells, s.dim)
    images = s.random(s.batch, 3, s.grid * s.patch, s.grid * s.patch)
    survivors = torch.arange(0, capacity, 2, device=s.device, dtype=torch.int32)
    grid = s.grid, s.grid
    call = _calling(ops.gather_tokens, tokens, survivors, None, False)
    yield Work(tuned.name_of(*halting.row_key("gather", tokens)), gather.GATHER_TILES, call, what)
    call = _calling(ops.merge_patches, images, *metadata, s.patch, False, None, None, False)
    yield Work(tuned.name_of(*patches.row_key(images, s.patch)), patches.MERGE_ROWS, call, what)
    call = _calling(ops.merge_tokens, features, *metadata, *grid, tokens[:1], False)
    yield Work(tuned.name_of(*cells.row_key("reduce_blocks", features)), cells.REDUCE_ROWS, call, what)
    for values in (scores, tokens):
        call = _calling(ops.scatter_back, values, *metadata, *grid, None)
        yield Work(tuned.name_of(*cells.row_key("expand_blocks", values)), cells.EXPAND_ROWS, call, what)
