"""Attention within each image of a packed batch, and the tile schedule that a stage's calls share."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from . import checks
from .checks import Tail, check_device, check_head_dim, check_int, check_no_grad, check_tail, check_tensor
from .layout import SupertokenLayout
from .library import define
from .numerics import accumulator
from .packed import check_cu_seqlens, check_longest, check_none_beside_layout, check_segments
from .schedule import num_tiles


@overload
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SupertokenLayout,
    /,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    schedule: Tensor | None = None,
    tail: Tail = "zero",
) -> Tensor: ...
@overload
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    schedule: Tensor | None = None,
    tail: Tail = "zero",
) -> Tensor: ...
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | SupertokenLayout,
    max_seqlen: int | None = None,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    schedule: Tensor | None = None,
    tail: Tail = "zero",
) -> Tensor:
    """softmax(q k^T * scale + key_bias) v within each image. Differentiable in q, k and v.

    ``ragged_attention(q, k, v, layout)``, or ``ragged_attention(q, k, v, cu_seqlens, max_seqlen)``.

    Equivalent PyTorch, for image b with rows ``s = slice(cu_seqlens[b], cu_seqlens[b + 1])``::

        F.scaled_dot_product_attention(*(x[s].transpose(0, 1) for x in (q, k, v)), attn_mask=key_bias[s], scale=scale)

    Args:
        q, k, v: [T, H, D] each, floating point, one dtype; views of one qkv tensor are welcome. D up to 256.
        cu_seqlens: a layout of capacity T, or int32 [B + 1] that starts at 0, is monotone and ends within T.
        max_seqlen: beside cu_seqlens only, a bound on the tokens of one image. An over-estimate is legal; our kernels do not read it, those of
            PyTorch's ``varlen_attn`` do (see ``STEP_KERNELS_ATTENTION``).
        scale: of the scores. None: 1 / sqrt(D).
        key_bias: [T], floating point, added to every score of a key: ``layout.log_sizes()``, the log of each token's number of cells
            with 0 for prefix tokens, gives proportional attention (ToMe, arXiv 2210.09461). No gradient.
        schedule: ``attention_schedule(layout)``, built once and shared by all calls with this layout. It makes ragged batches faster
            on a GPU and changes no result; one of another layout gives wrong ones.
        tail: rows past ``cu_seqlens[-1]``: ``"zero"`` or ``"undefined"``.

    Returns:
        [T, H, D], contiguous, in q's dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; key_bias requires a gradient. On a CPU, where that takes no sync, also
            wrong values of cu_seqlens and max_seqlen; on a GPU those give wrong results, but touch no memory beside the tensors'.
    """
    check_tensor("q", q, ("T", "H", "D"), contiguous_last=True)
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, tuple(q.shape), like=q, like_name="q", contiguous_last=True)
    check_head_dim("q", q)
    given, num_rows = cu_seqlens, q.shape[0]
    cu_seqlens = check_segments(given, "q", q)
    longest = check_longest(max_seqlen, given)
    scale = None if scale is None else checks.check_number("scale", scale)
    if schedule is not None:
        check_tensor("schedule", schedule, (num_tiles(num_rows, cu_seqlens.shape[0] - 1), 4), dtypes=(torch.int32,))
        check_device("schedule", schedule, q.device, "q")
        if not schedule.is_contiguous():
            raise ValueError(f"schedule: expected a contiguous tensor, got strides {list(schedule.stride())}")
        if checks.values() and not torch.equal(schedule, _attention_schedule(cu_seqlens, num_rows)):
            raise ValueError("schedule: expected attention_schedule of this layout or cu_seqlens, got another one")
    if key_bias is not None:
        check_tensor("key_bias", key_bias, (num_rows,))
        check_device("key_bias", key_bias, q.device, "q")
        check_no_grad("key_bias", key_bias, "key_bias has no gradient")
    # Inference saves no log-sum-exp: only a backward pass reads it.
    save_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return unchecked_attention(q, k, v, cu_seqlens, scale, key_bias, schedule, save_lse, check_tail(tail), longest)[0]


@overload
def attention_schedule(layout: SupertokenLayout, /) -> Tensor: ...
@overload
def attention_schedule(cu_seqlens: Tensor, num_rows: int) -> Tensor: ...
def attention_schedule(cu_seqlens: Tensor | SupertokenLayout, num_rows: int | None = None) -> Tensor:
    """The order in which ``ragged_attention`` works through a batch: tiles of 128 rows, those of the longest image first.

    ``attention_schedule(layout)``, or ``attention_schedule(cu_seqlens, num_rows)``.

    Built on the device, with no sync; one schedule serves all calls with this layout, forward and backward. Equivalent PyTorch, without
    the rows past the last tile (first row of the tail's tile, 0, 0, -1)::

        tiles = [(first, begin, end, image)
                 for image in lengths.argsort(descending=True, stable=True)
                 for first in range(begin, end, 128)]

    Args:
        cu_seqlens: a layout, or int32 [B + 1].
        num_rows: beside cu_seqlens only, the rows of the packed tensors, live or not (a layout's ``capacity``).

    Returns:
        int32 [ceil(num_rows / 128) + B, 4].

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape.
    """
    if isinstance(cu_seqlens, SupertokenLayout):
        check_none_beside_layout("num_rows", num_rows)
        return _attention_schedule(cu_seqlens.cu_seqlens, cu_seqlens.capacity)
    num_rows = check_int("num_rows", num_rows, minimum=0)
    return _attention_schedule(check_cu_seqlens(cu_seqlens, num_rows), num_rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, scale, key_bias, schedule, _, _, max_seqlen = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, key_bias, schedule)
    ctx.scale, ctx.max_seqlen = scale, max_seqlen


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, key_bias, schedule = ctx.saved_tensors
    metadata = cu_seqlens, ctx.scale, key_bias, schedule, ctx.max_seqlen
    return *_ragged_attention_backward(grad, q, k, v, out, lse, *metadata), *[None] * 7


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    save_lse = rest[6]
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]) if save_lse else (0,), dtype=accumulator(q.dtype))


_attention_schedule = define(
    "attention_schedule(Tensor cu_seqlens, SymInt num_rows) -> Tensor",
    module="attention",
    fake=lambda cu_seqlens, num_rows: cu_seqlens.new_empty(num_tiles(num_rows, cu_seqlens.shape[0] - 1), 4),
)
_ragged_attention_backward = define(
    "ragged_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "float? scale, Tensor? key_bias, Tensor? schedule, SymInt? max_seqlen=None) -> (Tensor, Tensor, Tensor)",
    module="attention",
    fake=lambda grad, q, *_: (q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)),
)
unchecked_attention = define(  # for callers whose tensors fit by the way they were made
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float? scale, Tensor? key_bias, "
    "Tensor? schedule, bool save_lse, bool fill_tail, SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    module="attention",
    fake=_fake,
    setup_context=_setup,
    backward=_gradients,
)
