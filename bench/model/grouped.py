"""ragged_linear through PyTorch's grouped_mm: one group whose end is the live count on the device, everything else as ours.

grouped_mm has no bias, activation or residual: those are element-wise kernels over the whole capacity, since PyTorch has none
that stop at a count on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import packed
from step_kernels.reference.linear import APPROXIMATE

from ..kernels.operation import Unavailable
from .case import MERGED_EXITS, Case
from .ours import static_graph
from .registry import Built

GroupedMM = Callable[..., Tensor]


def grouped_static(case: Case) -> Built:
    """Builder: the static graph with the linears of all blocks exchanged."""
    grouped_mm = find_grouped_mm()
    if case.inputs[0].dtype != torch.bfloat16:
        raise Unavailable(f"needs bfloat16, this is {case.settings.dtype}")
    return static_graph(case, MERGED_EXITS, lambda: through(grouped_mm))


def find_grouped_mm() -> GroupedMM:
    """`F.grouped_mm`, or what it was called before.

    Raises:
        Unavailable: this PyTorch has neither.
    """
    found: GroupedMM | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    return found


@contextlib.contextmanager
def through(grouped_mm: GroupedMM) -> Iterator[None]:
    """In this context the transformer blocks' linears on untrimmed layouts go through `grouped_mm`."""
    ours = packed.ragged_linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        layout = options["layout"]
        if not isinstance(layout, SupertokenLayout) or layout.trimmed:
            return ours(x, weight, bias, **options)
        return grouped_linear(grouped_mm, x, weight, bias, **options)

    packed.ragged_linear = linear
    try:
        yield
    finally:
        packed.ragged_linear = ours


def grouped_linear(
    grouped_mm: GroupedMM,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layout: SupertokenLayout,
    activation: str | None = None,
    residual: Tensor | None = None,
    tail: str = "undefined",
) -> Tensor:
    """`step_kernels.ragged_linear` without gamma on an untrimmed layout; rows past the live count are undefined."""
    out = grouped_mm(x, weight.t()[None], offs=layout.cu_seqlens[-1:])
    if bias is not None:
        out += bias
    if activation is not None:
        out = F.gelu(out, approximate=APPROXIMATE[activation])
    if residual is not None:
        out += residual
    return out
