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
from ..triton.common import tuned
from ..triton.common.launch import architecture, multiprocessors, power_of_2
from ..triton.common.operands import dtype_class, split_head_dim
from ..triton.linear import configs as linear
from ..triton.norm import launch as norm
from .measure import Outputs, Work
from .sizes import Sizes

ops = torch.ops.step_kernels
SPARE = 16  # rows past the tokens


def works(sizes: Sizes) -> Iterator[Work]:
    """Of all kernels, those that most of a model's time goes to first."""
    for work in (*_attention(sizes), *_linear(sizes), *_norm(sizes)):
        if len(work.candidates) > 1:
            yield work


def named(*key: object) -> str:
    return " ".join(map(str, key))


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
    yield Work(named(*key), [*rows, *other], _calling(forward, *qkv, *metadata, False, False, s.cells), what)
    out, lse = ops.ragged_attention(*qkv, *metadata, True, True)
    call = _calling(backward, grad, *qkv, out, lse, *metadata, s.cells)
    for kernel in ("attention_grad_kv", "attention_grad_q"):
        rows = attention.backward_candidates(kernel, target, s.dtype, columns)
        yield Work(named(kernel, dtype_class(s.dtype), columns), rows, call, what)
    if other:
        key = row_key("attention_backward", q, s.cu_seqlens)
        yield Work(named(*key), [tuned.TRITON, *other], call, what)


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
        key = f"linear {precision} {inputs} {outputs} {power_of_2(s.tokens)}"
        rows = dict.fromkeys((default, *linear.candidates(architecture(s.device), precision)))
        yield Work(key, [*rows], call, f"{s.tokens} tokens, {inputs} to {outputs}")


def _norm(s: Sizes) -> Iterator[Work]:
    x, weight, bias = s.random(s.tokens, s.dim), s.random(s.dim, seed=1), s.random(s.dim, seed=2)
    call = _calling(ops.ragged_layer_norm, x, weight, bias, 1e-6, s.cu_seqlens, False)
    yield Work(named(*norm.row_key(x)), norm.forward_candidates(x), call, f"{s.tokens} tokens of {s.dim}")
