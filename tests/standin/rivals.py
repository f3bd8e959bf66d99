"""Ops of other people that no CPU computes, and that bench runs on a GPU: what their kernels would return."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import marks

BACKEND = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, *rest: Any, **named: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [T, H, D] and logsumexp [H, T], NaN past the last image; the state of the dropout, which nobody reads."""
    assert q.dtype in (torch.bfloat16, torch.float16) and cu_q.dtype == torch.int32 and not is_causal
    with marks.hidden():
        out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.float32)
        for first, end in itertools.pairwise(cu_q.tolist()):
            assert end - first <= min(max_q, max_k)
            image = [x[first:end].transpose(0, 1)[None].float() for x in (q, k, v)]
            if first < end:
                lse[:, first:end] = (image[0] @ image[1].mT * (scale or q.shape[-1] ** -0.5)).logsumexp(-1)[0]
                out[first:end] = F.scaled_dot_product_attention(*image, scale=scale)[0].transpose(0, 1)
        return out, lse, torch.zeros(2, dtype=torch.uint64)


def varlen_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, is_causal: bool, state: Tensor, scale: float | None = None, *rest: Any, **named: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k and v, NaN past the last image."""
    assert not is_causal and state.dtype == torch.uint64
    with marks.hidden():
        found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        for first, end in itertools.pairwise(cu_q.tolist()):
            queries, keys, values, cotangent = (x[first:end].transpose(0, 1).float() for x in (q, k, v, grad))
            weights = (queries @ keys.mT * scale).softmax(-1)
            of_weights = cotangent @ values.mT
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
            image = of_scores @ keys, of_scores.mT @ queries, weights.mT @ cotangent
            for whole, part in zip(found, image, strict=True):
                whole[first:end] = part.transpose(0, 1)
        return tuple(found)


RIVALS = {"torch_attn::_varlen_attn": varlen_attn, "torch_attn::_varlen_attn_backward": varlen_attn_backward}


class OnCPU(TorchDispatchMode):
    """Stands in for them alone, on ordinary tensors of the CPU; notes which, and the bound on the tokens of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if func.namespace == "step_kernels":
            with self:
                return func.redispatch(BACKEND, *args, **kwargs or {})
        if name in RIVALS:
            names = [argument.name for argument in func._schema.arguments]
            self.seen.append((name, args[names.index("max_q")]))
        return RIVALS.get(name, func)(*args, **kwargs or {})
