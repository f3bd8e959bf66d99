"""FLOPs of the ops for PyTorch's own counter, ``FlopCounterMode``, which counts them once this module is imported.

::

    import step_kernels.flops
    with torch.utils.flop_counter.FlopCounterMode() as counter:
        model(images)

Its convention: matmuls only, 1 MAC = 2 FLOPs, a backward's recomputed matmuls included. Rows past the live count and keys of other
images are not counted: the formulas read the token counts, which waits for the device. ``import step_kernels`` leaves this module
out, because PyTorch's counter imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Matmuls of attention: scores and mix; the scores again, and one for each gradient of the scores, values, queries and keys.
FORWARD, BACKWARD = 2, 5


def live(cu_seqlens: Tensor | None, rows: Tensor) -> int:
    """Rows that hold tokens."""
    return rows.shape[0] if cu_seqlens is None else int(cu_seqlens[-1])


def pairs(cu_seqlens: Tensor) -> int:
    """Pairs of tokens of one image."""
    return int(cu_seqlens.diff().long().square().sum())


def kept_pairs(q: Tensor, counts: Tensor, all_keys: bool) -> int:
    """Pairs of a kept query and a key of its image; q [B, H, L, D]."""
    kept = counts.long()
    return int((kept * (q.shape[2] if all_keys else kept)).sum())


def channels(q: Tensor) -> int:
    """All heads' together; q [..., H, D]."""
    return q.shape[-2] * q.shape[-1]


# Multiply-accumulates by an op's arguments, each by the name that it has in the schema.
MACS: dict[str, Callable[..., int]] = {
    "ragged_linear": lambda x, weight, cu_seqlens, **_: live(cu_seqlens, x) * weight.numel(),
    "ragged_linear_backward": lambda x, weight, cu_seqlens, activation, needed, **_: (
        (needed[0] + needed[1] + (activation is not None or needed[3])) * live(cu_seqlens, x) * weight.numel()
    ),
    "embed_patches": lambda weight, cu_seqlens, cells, **_: live(cu_seqlens, cells) * weight.numel(),
    "embed_patches_backward": lambda weight, cu_seqlens, cells, needed, **_: (
        (needed[0] + needed[1]) * live(cu_seqlens, cells) * weight.numel()
    ),
    "exit_head": lambda tokens, weight, cu_seqlens, **_: live(cu_seqlens, tokens) * weight.numel(),
    "ragged_attention": lambda q, cu_seqlens, **_: FORWARD * pairs(cu_seqlens) * channels(q),
    "ragged_attention_backward": lambda q, cu_seqlens, **_: BACKWARD * pairs(cu_seqlens) * channels(q),
    "class_attention": lambda q, k, cu_seqlens, **_: FORWARD * live(cu_seqlens, k) * q.shape[1:].numel(),
    "class_attention_backward": lambda grad, q, k, cu_seqlens, **_: (  # grad None: through the scores alone, to q and k
        (BACKWARD if grad is not None else 2) * live(cu_seqlens, k) * q.shape[1:].numel()
    ),
    "class_scores": lambda q, k, cu_seqlens, **_: live(cu_seqlens, k) * q.shape[1:].numel(),
    "class_scores_backward": lambda q, k, cu_seqlens, needed, **_: (
        sum(needed) * live(cu_seqlens, k) * q.shape[1:].numel()
    ),
    "masked_attention": lambda q, counts, all_keys, **_: (
        FORWARD * kept_pairs(q, counts, all_keys) * q.shape[1] * q.shape[3]
    ),
    "masked_attention_backward": lambda q, counts, all_keys, **_: (
        BACKWARD * kept_pairs(q, counts, all_keys) * q.shape[1] * q.shape[3]
    ),
}


def register(op: str, macs: Callable[..., int]) -> None:
    packet = getattr(torch.ops.step_kernels, op)
    names = [argument.name for argument in packet.default._schema.arguments]

    def flops(*args: Any, out_val: Any) -> int:
        return 2 * macs(**dict(zip(names, args, strict=False)))  # the dispatcher passes no trailing defaults

    register_flop_formula(packet, get_raw=True)(flops)


for name, macs in MACS.items():
    register(name, macs)
