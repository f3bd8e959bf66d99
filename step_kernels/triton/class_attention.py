"""class_attention and class_scores: class queries against each image's tokens, and the scores alone (averaged over heads).

Equivalent PyTorch: ``reference/class_attention.py``. Attention itself: ``cross_attention``. The mean over heads of q . k is one dot product
over all heads' channels, so ``class_scores_kernel`` is a plain matmul of a tile of tokens with its image's queries that writes each score
once; adding the heads up inside the attention kernel would need an order among programs. The gradient of class_scores in k is the same
matmul: the scores' gradient [T, C] against columns of q. Device kernels, zeros of tails and empty images included: class_attention 1 forward,
2 with scores, 2 backward; class_scores 1 forward, 2 backward. Bytes of the scores: k and q once per tile that meets them, the scores [T, C] once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..library import empty_of
from .common.launch import OPTIONS, ceil_div, input_precision, on_device_of
from .common.live_rows import image_of, rows_of
from .common.matrix import add_dot
from .common.operands import dtype_class
from .common.tiles import IMAGES, find_tile
from .cross_attention.launch import Operand, Rows, launch_backward, launch_forward, operand, operands_width

# One program's tokens and classes (or channels, where these are what is not summed over), and what each step sums: channels of any heads,
# classes or tokens. Not measured on a GPU yet: 64 x 64 sums take 32 registers per thread and give 150 classes and 1600 tokens of one
# image 75 programs.
TOKENS = 64
CLASSES = 64
STEP = {"half": 64, "float": 32}  # 128 bytes of a row


@triton.jit
def _aligned(offsets, VECTOR: tl.constexpr):
    """Multiples of VECTOR, said to the compiler; saying 1 would take away what it finds out, as for contiguous rows (columns of q)."""
    if VECTOR > 1:
        offsets = tl.multiple_of(offsets, VECTOR)
    return offsets


@triton.jit
def _load_channels(base, rows, strides, inside, channel, width, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr):
    """[rows, channels]: the heads of a row as one vector (HEAD_DIM 0: there is one); zero in rows that are not inside."""
    offsets = _aligned(rows.to(tl.int64) * strides[0], VECTOR)
    if HEAD_DIM > 0:
        heads = _aligned((channel // HEAD_DIM).to(tl.int64) * strides[1], VECTOR)
        columns = heads + channel % HEAD_DIM * strides[2]
    else:
        columns = channel.to(tl.int64) * strides[2]
    mask = inside[:, None] & (channel < width)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "batch_size"])
def class_scores_kernel(
    scores_ptr, q_ptr, k_ptr, cu_seqlens_ptr, q_strides, k_strides, factor, width, num_rows, num_classes, batch_size,
    FILL_TAIL: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, CLASSES: tl.constexpr,
    STEP: tl.constexpr, IMAGES: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [T, C], tail zero. Grid: (cdiv(T, TOKENS) + B) * cdiv(C, CLASSES), classes fastest."""
    tiles = tl.cdiv(num_classes, CLASSES)
    first, _, end = find_tile(cu_seqlens_ptr, None, tl.program_id(0) // tiles, batch_size, num_rows, TOKENS, IMAGES)
    image = image_of(cu_seqlens_ptr, first, batch_size, IMAGES)
    tokens = first + tl.arange(0, TOKENS)
    classes = tl.program_id(0) % tiles * CLASSES + tl.arange(0, CLASSES)
    width = tl.where(end > 0, width, 0)  # the tail's tiles have end 0
    queries_ptr = q_ptr + _aligned(image * q_strides[3], VECTOR)
    total = tl.zeros([TOKENS, CLASSES], tl.float32)
    for start in range(0, width, STEP):
        channel = start + tl.arange(0, STEP)
        keys = _load_channels(k_ptr, tokens, k_strides, tokens < end, channel, width, HEAD_DIM, VECTOR)
        queries = _load_channels(
            queries_ptr, classes, q_strides, classes < num_classes, channel, width, HEAD_DIM, VECTOR
        )
        total = add_dot(total, keys, queries.T, PRECISION)
    stored = tokens < end
    if FILL_TAIL:
        stored = tokens < tl.where(end > 0, end, num_rows)
    total = total * tl.cast(factor, tl.float32)
    address = scores_ptr + tokens.to(tl.int64)[:, None] * num_classes + classes[None, :]
    tl.store(address, total.to(scores_ptr.dtype.element_ty), mask=stored[:, None] & (classes < num_classes)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def grad_class_vectors_kernel(
    grad_q_ptr, grad_ptr, k_ptr, cu_seqlens_ptr, grad_strides, k_strides, factor, num_rows, num_classes, width,
    TOKENS: tl.constexpr, CLASSES: tl.constexpr, CHANNELS: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q [B, C, D], zeros for an image without tokens. Grid: B * cdiv(C, CLASSES) * cdiv(D, CHANNELS), channels fastest."""
    parts = tl.cdiv(width, CHANNELS)
    tiles = tl.cdiv(num_classes, CLASSES)
    image = (tl.program_id(0) // (tiles * parts)).to(tl.int64)
    classes = tl.program_id(0) // parts % tiles * CLASSES + tl.arange(0, CLASSES)
    channel = tl.program_id(0) % parts * CHANNELS + tl.arange(0, CHANNELS)
    begin, end = rows_of(cu_seqlens_ptr, image, num_rows)
    total = tl.zeros([CLASSES, CHANNELS], tl.float32)
    for start in range(begin, end, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        grads = _load_channels(grad_ptr, tokens, grad_strides, tokens < end, classes, num_classes, 0, VECTOR)
        keys = _load_channels(k_ptr, tokens, k_strides, tokens < end, channel, width, 0, VECTOR)
        total = add_dot(total, grads.T, keys, PRECISION)
    total = total * tl.cast(factor, tl.float32)
    address = grad_q_ptr + (image * num_classes + classes[:, None]) * width + channel[None, :]
    mask = (classes < num_classes)[:, None] & (channel < width)[None, :]
    tl.store(address, total.to(grad_q_ptr.dtype.element_ty), mask=mask)


def class_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    with_scores: bool,
    save_lse: bool,
    fill_tail: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_classes, num_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    scores = q.new_empty((k.shape[0], num_classes) if with_scores else (0,))
    lse = q.new_empty((batch_size, num_heads, num_classes) if save_lse else (0,), dtype=torch.float32)
    scale = head_dim**-0.5 if scale is None else scale
    queries, keys, values = operand(q, 1, 2, 0), operand(k, 0, 1, None), operand(v, 0, 1, None)
    where = Rows(batch_size, num_classes, cu_seqlens=cu_seqlens)
    with on_device_of(q):
        if out.numel():
            launch_forward(out, lse if save_lse else None, queries, keys, values, where, num_heads, scale)
        if scores.numel():
            width, factor = num_heads * head_dim, scale / max(num_heads, 1)
            _scores(scores, queries, keys, cu_seqlens, width, factor, fill_tail, head_dim)
    return out, scores, lse


def class_scores(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float, fill_tail: bool) -> Tensor:
    scores = q.new_empty(k.shape[0], q.shape[1])
    with on_device_of(q):
        if scores.numel():
            queries, keys = operand(q, 1, None, 0), operand(k, 0, None, None)
            _scores(scores, queries, keys, cu_seqlens, k.shape[1], scale, fill_tail)
    return scores


def _scores(
    scores: Tensor,
    q: Operand,
    k: Operand,
    cu_seqlens: Tensor,
    width: int,
    factor: float,
    fill_tail: bool,
    head_dim: int = 0,
) -> None:
    """Write ``scores`` [T, C], contiguous: over ``width`` channels, in heads of ``head_dim`` (0: one head)."""
    (num_rows, num_classes), batch_size = scores.shape, cu_seqlens.shape[0] - 1
    programs = (ceil_div(num_rows, TOKENS) + batch_size) * ceil_div(num_classes, CLASSES)
    class_scores_kernel[(programs,)](
        scores, q.tensor, k.tensor, cu_seqlens, q.strides, k.strides, factor, width, num_rows, num_classes, batch_size,
        FILL_TAIL=fill_tail, HEAD_DIM=head_dim, TOKENS=TOKENS, CLASSES=CLASSES, STEP=STEP[dtype_class(scores.dtype)],
        IMAGES=IMAGES, PRECISION=input_precision(scores.dtype), **_loads(q, k), **OPTIONS,
    )  # fmt: skip


def _loads(*operands: Operand) -> dict[str, int]:
    """Rows that start anywhere take an address per element: 4 warps would spill."""
    width = operands_width(operands)
    return {"VECTOR": width, "num_warps": 4 if width > 1 else 8, "num_stages": 3}


def class_attention_backward(
    grad: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    fill_tail: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_classes, num_heads, head_dim = q.shape
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if num_heads == 0:
        return grads
    if lse.numel() == 0 and out.numel():  # the registered op was called without save_lse
        lse = class_attention(q, k, v, cu_seqlens, scale, False, True, False)[2]
    cotangent = None if grad is None else operand(grad, 1, 2, 0)
    operands = operand(q, 1, 2, 0), operand(k, 0, 1, None), operand(v, 0, 1, None), operand(out, 1, 2, 0)
    where = Rows(batch_size, num_classes, cu_seqlens=cu_seqlens)
    scale = head_dim**-0.5 if scale is None else scale
    with on_device_of(q):
        launch_backward(grads, *operands, cotangent, grad_scores, lse, where, num_heads, scale, fill_tail)
    return grads


def class_scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float, fill_tail: bool, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    batch_size, num_classes, width = q.shape
    grad_q, grad_k = empty_of(needed, q, (q.shape, k.shape))
    cotangent, keys = operand(grad, 0, None, None), operand(k, 0, None, None)
    with on_device_of(q):
        if grad_q.numel():
            programs = batch_size * ceil_div(num_classes, CLASSES) * ceil_div(width, CLASSES)
            grad_class_vectors_kernel[(programs,)](
                grad_q, grad, k, cu_seqlens, cotangent.strides, keys.strides, scale, k.shape[0], num_classes, width,
                TOKENS=STEP[dtype_class(q.dtype)], CLASSES=CLASSES, CHANNELS=CLASSES,
                PRECISION=input_precision(q.dtype), **_loads(cotangent, keys), **OPTIONS,
            )  # fmt: skip
        if grad_k.numel():
            columns = operand(q.mT, 1, None, 0)  # [B, D, C]: the gradient is the scores of grad with these
            _scores(grad_k, columns, cotangent, cu_seqlens, num_classes, scale, fill_tail)
    return grad_q, grad_k
