"""The kernels behind ``ragged_attention`` on a GPU: this package's own, or those of PyTorch's ``varlen_attn``.

``varlen`` is FlashAttention 2, cuDNN, or what ``activate_flash_attention_impl`` put in their place: PyTorch chooses. ``STEP_KERNELS_ATTENTION``
names a provider for all calls and raises where it cannot run. Without it, the rows that ``tune`` measured say where ``varlen`` is faster;
where it cannot run, and without such rows, our kernels do.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

PROVIDERS = ("triton", "varlen")


def _named() -> str | None:
    name = os.environ.get("STEP_KERNELS_ATTENTION")
    if name is not None and name not in PROVIDERS:
        raise ValueError(
            f"environment variable STEP_KERNELS_ATTENTION: expected one of {', '.join(PROVIDERS)}, got {name!r}"
        )
    return name


named = _named()


def why_not_varlen(q: Tensor, k: Tensor, v: Tensor, scale: float | None, key_bias: Tensor | None) -> str | None:
    """The reason why PyTorch's kernels cannot compute this; None where they can."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"varlen_attn computes in float16 and bfloat16, q is {q.dtype}"
    if q.shape[2] % 8:
        return f"varlen_attn takes head dimensions that are multiples of 8, q has {q.shape[2]}"
    if key_bias is not None:
        return "varlen_attn adds no key_bias to scores"
    if scale is not None and not scale > 0:
        return f"varlen_attn takes scales above 0, got {scale}"
    if any(x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) % 8 for x in (q, k, v)):
        return (
            "varlen_attn loads 16 bytes at a time, and q, k or v has heads that start elsewhere than at multiples of 16"
        )
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None, fill_tail: bool, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """As ``ragged_attention`` of either floor returns it, log-sum-exp included."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    longest = _longest(q, max_seqlen)
    out, lse = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, return_aux=AuxRequest(lse=True), scale=scale
    )
    if lse.shape != (q.shape[1], q.shape[0]):
        raise RuntimeError(f"varlen_attn of torch {torch.__version__}: expected lse [H, T], got {list(lse.shape)}")
    out, lse = out.contiguous(), lse.contiguous()
    if fill_tail:
        _zero_past_live_rows(out, cu_seqlens)
        lse.masked_fill_(_past_live_rows(lse.shape[1], cu_seqlens), 0)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the op behind ``varlen_attn``'s own gradient: ours is registered below autograd."""
    from torch.nn.attention import varlen

    longest, window = _longest(q, max_seqlen), [-1, -1]
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    chosen = []  # from torch 2.15 on, what the forward pass leaves to PyTorch's choice, too
    if hasattr(varlen, "_select_backend"):
        chosen = [varlen._select_backend(q, k, v, cu_seqlens, cu_seqlens, longest, window)]
    found = torch.ops.torch_attn._varlen_attn_backward(
        grad.contiguous(), q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, longest, False, state, scale, window, *chosen
    )  # fmt: skip
    grad_q, grad_k, grad_v = (_zero_past_live_rows(x.contiguous(), cu_seqlens) for x in found)
    return grad_q, grad_k, grad_v


def _longest(q: Tensor, max_seqlen: int | None) -> int:
    """A bound on an image's tokens that the host knows."""
    return max(1, q.shape[0] if max_seqlen is None else max_seqlen)


def _past_live_rows(num_rows: int, cu_seqlens: Tensor) -> Tensor:
    return torch.arange(num_rows, device=cu_seqlens.device) >= cu_seqlens[-1]


def _zero_past_live_rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.masked_fill_(_past_live_rows(x.shape[0], cu_seqlens)[:, None, None], 0)
