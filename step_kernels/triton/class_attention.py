"""class_attention: class queries against each image's tokens, and the scores averaged over heads.

Equivalent PyTorch: ``reference/class_attention.py``. Attention itself: ``cross_attention.py``. The mean over heads of q . k is one dot product
over all heads' channels, so ``mean_scores_kernel`` is a plain matmul of a tile of tokens with its image's queries that writes each score
once; adding the heads up inside the attention kernel would need an order among programs. Device kernels: 1 forward, 2 with scores (zeros of
tails and empty images included); 2 backward. Bytes of the scores: k and q once per tile that meets them, the scores [T, C] once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import IMAGES, find_tile
from .configs import dtype_class
from .cross_attention import image_of
from .cross_attention_launch import Operand, Rows, attend, gradients, operand, vector
from .launch import OPTIONS, fp32_precision, on_device_of

# One program's tokens, classes, and channels (of any heads) of each step. Not measured on a GPU yet: 64 x 64 sums take 32 registers per
# thread and give 150 classes and 1600 tokens of one image 75 programs.
TOKENS = 64
CLASSES = 64
CHANNELS = {"half": 64, "float": 32}  # 128 bytes of a row


@triton.jit
def _load_channels(base, rows, strides, inside, channel, width, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr):
    """[rows, channels]: the heads of a row as one vector; zero in rows that are not inside."""
    head = (channel // HEAD_DIM).to(tl.int64)
    offsets = tl.multiple_of(rows.to(tl.int64) * strides[0], VECTOR)[:, None]
    columns = tl.multiple_of(head * strides[1], VECTOR) + channel % HEAD_DIM * strides[2]
    return tl.load(base + offsets + columns[None, :], mask=inside[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def mean_scores_kernel(
    scores_ptr, q_ptr, k_ptr, cu_seqlens_ptr, q_strides, k_strides, factor, num_heads, num_rows, num_classes, batch_size,
    FILL_TAIL: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr, IMAGES: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [T, C], tail zero. Grid: (cdiv(T, TOKENS) + B) * cdiv(C, CLASSES), classes fastest."""
    tiles = tl.cdiv(num_classes, CLASSES)
    first, _, end = find_tile(cu_seqlens_ptr, None, tl.program_id(0) // tiles, batch_size, num_rows, TOKENS, IMAGES)
    image = image_of(cu_seqlens_ptr, first, batch_size, IMAGES)
    tokens = first + tl.arange(0, TOKENS)
    classes = tl.program_id(0) % tiles * CLASSES + tl.arange(0, CLASSES)
    width = tl.where(end > 0, num_heads * HEAD_DIM, 0)  # the tail's tiles have end 0
    queries_ptr = q_ptr + tl.multiple_of(image * q_strides[3], VECTOR)
    total = tl.zeros([TOKENS, CLASSES], tl.float32)
    for start in range(0, width, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        keys = _load_channels(k_ptr, tokens, k_strides, tokens < end, channel, width, HEAD_DIM, VECTOR)
        queries = _load_channels(
            queries_ptr, classes, q_strides, classes < num_classes, channel, width, HEAD_DIM, VECTOR
        )
        total = tl.dot(keys, queries.T, total, input_precision=PRECISION)
    stored = tokens < end
    if FILL_TAIL:
        stored = tokens < tl.where(end > 0, end, num_rows)
    total = total * tl.cast(factor, tl.float32)
    address = scores_ptr + tokens.to(tl.int64)[:, None] * num_classes + classes[None, :]
    tl.store(address, total.to(scores_ptr.dtype.element_ty), mask=stored[:, None] & (classes < num_classes)[None, :])


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
            attend(out, lse if save_lse else None, queries, keys, values, where, num_heads, scale)
        if scores.numel():
            _mean_scores(scores, queries, keys, cu_seqlens, scale, fill_tail)
    return out, scores, lse


def _mean_scores(scores: Tensor, q: Operand, k: Operand, cu_seqlens: Tensor, scale: float, fill_tail: bool) -> None:
    num_rows, num_heads, head_dim = k.tensor.shape
    num_classes, batch_size = scores.shape[1], cu_seqlens.shape[0] - 1
    programs = (triton.cdiv(num_rows, TOKENS) + batch_size) * triton.cdiv(num_classes, CLASSES)
    mean_scores_kernel[(programs,)](
        scores, q.tensor, k.tensor, cu_seqlens, q.strides, k.strides, scale / max(num_heads, 1), num_heads, num_rows,
        num_classes, batch_size,
        FILL_TAIL=fill_tail, HEAD_DIM=head_dim, TOKENS=TOKENS, CLASSES=CLASSES, CHANNELS=CHANNELS[dtype_class(scores.dtype)],
        IMAGES=IMAGES, VECTOR=vector((q, k)), PRECISION=fp32_precision(), num_warps=4, num_stages=3, **OPTIONS,
    )  # fmt: skip


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
        gradients(grads, *operands, cotangent, grad_scores, lse, where, num_heads, scale, fill_tail)
    return grads
