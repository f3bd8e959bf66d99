"""Ops of other people that no CPU computes, and that bench runs on a GPU: what their kernels would return."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import marks


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, *rest: Any, **named: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [T, H, D], NaN past the last image; logsumexp and the state of the dropout, which nobody reads."""
    assert q.dtype in (torch.bfloat16, torch.float16) and cu_q.dtype == torch.int32 and not is_causal
    with marks.hidden():
        out = torch.full_like(q, torch.nan)
        for first, end in itertools.pairwise(cu_q.tolist()):
            assert end - first <= min(max_q, max_k)
            image = [x[first:end].transpose(0, 1)[None].float() for x in (q, k, v)]
            if first < end:
                out[first:end] = F.scaled_dot_product_attention(*image, scale=scale)[0].transpose(0, 1)
        return out, out.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


RIVALS = {"torch_attn::_varlen_attn": varlen_attn}
