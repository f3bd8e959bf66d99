"""What ``tune`` measures: each kernel with a table of rows, called through its registered op at the sizes of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention import attention_schedule
from ..triton.attention import configs as attention
from ..triton.attention.launch import has_few_programs
from ..triton.common.launch import architecture, multiprocessors, power_of_2
from ..triton.common.operands import dtype_class, split_head_dim
from ..triton.linear import configs as linear
from .measure import Outputs, Work
from .sizes import Sizes

ops = torch.ops.step_kernels


def works(sizes: Sizes) -> Iterator[Work]:
    """Of all kernels, those that most of a model's time goes to first."""
    yield from _attention(sizes)
    yield from _linear(sizes)


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
    width = s.dim // s.num_heads
    schedule = attention_schedule(s.cu_seqlens, s.tokens)
    what = f"{s.batch} images, {s.tokens} tokens, {s.num_heads} heads of {width}"
    qkv = s.random(s.tokens, 3, s.num_heads, width).unbind(1)
    call = _calling(ops.ragged_attention, *qkv, s.cu_seqlens, None, None, schedule, False, False)
    columns = sum(split_head_dim(width))
    few = has_few_programs(s.tokens, s.batch, s.num_heads, multiprocessors(s.device))
    candidates = attention.forward_candidates(architecture(s.device), s.dtype, columns, few)
    yield Work(f"attention_forward {dtype_class(s.dtype)} {columns}" + few * " few", candidates, call, what)


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
