"""Merging: image patches, or tokens, into supertokens (STEP's dCTS, arXiv 2509.14165)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import checks
from .checks import Tail, check_choice, check_int, check_optional, check_tail, check_tensor
from .layout import SupertokenLayout
from .library import define, empty_of, those
from .packed import check_layout
from .validation import validate_statistic

Resample = Literal["area", "bilinear"]
RESAMPLE = get_args(Resample)
Statistics = Tensor | Sequence[float] | None


def merge_patches(
    images: Tensor,
    layout: SupertokenLayout,
    patch_size: int,
    *,
    resample: Resample = "area",
    mean: Statistics = None,
    std: Statistics = None,
    tail: Tail = "zero",
) -> Tensor:
    """Resize each supertoken's block of pixels to one patch and flatten it. Differentiable in floating-point ``images``.

    Equivalent PyTorch, for a block of side s whose pixels are ``x`` [1, C, s * p, s * p]::

        F.avg_pool2d(x, s).flatten()                                                            # area
        F.interpolate(x, scale_factor=1 / s, mode="bilinear", align_corners=False).flatten()    # bilinear

    Args:
        images: [B, C, rows * patch_size, cols * patch_size], floating point or uint8, any strides.
        layout: the batch's layout.
        patch_size: p, pixels per cell side.
        resample: ``"area"`` (mean of s x s pixels) or ``"bilinear"`` (mean of the central 2 x 2).
        mean, std: per-channel statistics: tensors [C] on the images' device, or C floats (copied to the device at each call).
            Floating-point images become (image - mean) / std, uint8 images (image / 255 - mean) / std; uint8 images are
            divided by 255 in any case, so theirs lie in 0 to 1. No gradient.
        tail: rows past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        [capacity, C * p * p] in the images' dtype (float32 for uint8), columns in the order of ``Conv2d.weight.flatten(1)``.
        Prefix rows are zero.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; images that do not match the layout's grid; statistics
            without a meaning (floats, and tensors on a CPU: those on a GPU are not read).
    """
    check_layout(layout, "images", images)
    check_int("patch_size", patch_size, minimum=1)
    _check_images(images, layout, patch_size)
    check_choice("resample", resample, RESAMPLE)
    fill = check_tail(tail)
    mean, std = _statistics(images, mean, std)
    bilinear = resample == "bilinear"
    return _merge_patches(images, layout.cu_seqlens, layout.cells, patch_size, bilinear, mean, std, fill)


def embed_patches(
    images: Tensor,
    layout: SupertokenLayout,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    resample: Resample = "area",
    mean: Statistics = None,
    std: Statistics = None,
    tail: Tail = "zero",
) -> Tensor:
    """Merge and embed: ``merge_patches``, the patch embedding, pooled position embeddings and prefix tokens in one.

    Equivalent PyTorch::

        x = F.linear(merge_patches(images, layout, p), weight.flatten(1), bias)     # rows of blocks
        x += merge_tokens(pos_embed.expand(B, -1, -1), layout)                      # area; bilinear: mean of the central 2 x 2 cells
        x[prefix rows of every image] = prefix

    Differentiable in images, weight, bias, pos_embed and prefix.

    Args:
        images: [B, C, rows * p, cols * p], of weight's dtype, or uint8.
        layout: the batch's layout.
        weight: [D, C, p, p], the patch embedding's convolution.
        bias: [D].
        pos_embed: [rows * cols, D], one position embedding per cell.
        prefix: [num_prefix, D]: what prefix rows hold (class token plus its position, say). None: zeros.
        resample, mean, std, tail: as in ``merge_patches``.

    Returns:
        [capacity, D] in weight's dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    check_layout(layout, "images", images)
    check_tensor("weight", weight, ("D", "C", "p", "p"))
    dim, channels, patch_size, width = weight.shape
    if patch_size != width:
        raise ValueError(f"weight: expected square patches [D, C, p, p], got {list(weight.shape)}")
    _check_images(images, layout, patch_size)
    if images.shape[1] != channels:
        raise ValueError(f"weight: expected {images.shape[1]} input channels as images has, got {channels}")
    if images.dtype not in (weight.dtype, torch.uint8):
        raise TypeError(f"images: expected {weight.dtype} as weight has, or uint8, got {images.dtype}")
    rows, cols = layout.grid
    check_optional("bias", bias, (dim,), like=weight, like_name="weight")
    check_optional("pos_embed", pos_embed, (rows * cols, dim), like=weight, like_name="weight")
    check_optional("prefix (layout.num_prefix rows)", prefix, (layout.num_prefix, dim), like=weight, like_name="weight")
    checks.check_device("weight", weight, images.device, "images")
    check_choice("resample", resample, RESAMPLE)
    fill = check_tail(tail)
    mean, std = _statistics(images, mean, std)
    return _embed_patches(
        images,
        weight,
        bias,
        pos_embed,
        prefix,
        mean,
        std,
        layout.cu_seqlens,
        layout.cells,
        resample == "bilinear",
        layout.trimmed,
        fill,
        layout.expected_tokens,
    )


def merge_tokens(
    tokens: Tensor, layout: SupertokenLayout, *, prefix: Tensor | None = None, tail: Tail = "zero"
) -> Tensor:
    """Mean of the tokens in each block. Differentiable in tokens and prefix.

    Equivalent PyTorch, for a block of side s at cell (r, c) of image b::

        tokens[b].view(rows, cols, D)[r:r + s, c:c + s].mean((0, 1))

    Args:
        tokens: [B, rows * cols, D], floating point: one token per cell, no prefix.
        layout: the batch's layout.
        prefix: [num_prefix, D]: what prefix rows hold. None: zeros.
        tail: rows past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        [capacity, D], sums kept in fp32.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    check_layout(layout, "tokens", tokens)
    rows, cols = layout.grid
    check_tensor("tokens", tokens, (layout.batch_size, rows * cols, "D"), contiguous_last=True)
    shape = (layout.num_prefix, tokens.shape[2])
    check_optional("prefix (layout.num_prefix rows)", prefix, shape, like=tokens, like_name="tokens")
    return _merge_tokens(tokens, layout.cu_seqlens, layout.cells, rows, cols, prefix, check_tail(tail))


def _check_images(images: Tensor, layout: SupertokenLayout, patch_size: int) -> None:
    rows, cols = layout.grid
    shape = (layout.batch_size, "C", rows * patch_size, cols * patch_size)
    check_tensor("images", images, shape, dtypes=(*checks.FLOATING, torch.uint8))


def _statistics(images: Tensor, mean: Statistics, std: Statistics) -> tuple[Tensor | None, Tensor | None]:
    return _statistic("mean", mean, images), _statistic("std", std, images)


def _statistic(name: str, value: Statistics, images: Tensor) -> Tensor | None:
    if value is None:
        return None
    channels = images.shape[1]
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        numbers: Any = value if checks.readable(value) else ()
    elif not isinstance(value, (list, tuple)) or not all(isinstance(v, (int, float)) for v in value):
        raise TypeError(f"{name}: expected {channels} floats or a tensor [C], got {checks.describe(value)}")
    else:
        numbers, value = value, torch.tensor(value, dtype=dtype, device=images.device)
    check_tensor(name, value, (channels,))
    checks.check_device(name, value, images.device, "images")
    checks.check_no_grad(name, value, "the statistics are constants")
    validate_statistic(name, numbers, of_bytes=images.dtype == torch.uint8)
    return value.to(dtype)  # what they are used in


def _setup_merge_patches(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, cu_seqlens, cells, patch_size, bilinear, _, std, _ = inputs
    ctx.save_for_backward(cu_seqlens, cells, std)
    ctx.image_shape, ctx.patch_size, ctx.bilinear = list(images.shape), patch_size, bilinear


def _merge_patches_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cu_seqlens, cells, std = ctx.saved_tensors
    images = _merge_patches_backward(grad, cu_seqlens, cells, ctx.image_shape, ctx.patch_size, ctx.bilinear, std)
    return images, None, None, None, None, None, None, None


def _setup_embed_patches(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, weight, _, _, prefix, mean, std, cu_seqlens, cells, bilinear, *_ = inputs
    ctx.save_for_backward(images, weight, mean, std, cu_seqlens, cells)
    ctx.bilinear, ctx.num_prefix = bilinear, 0 if prefix is None else prefix.shape[0]


def _embed_patches_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, mean, std, cu_seqlens, cells = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:5])
    grads = _embed_patches_backward(
        grad, images, weight, mean, std, cu_seqlens, cells, ctx.bilinear, ctx.num_prefix, needed
    )
    return *those(needed, grads), *[None] * 8


def _fake_embed_backward(grad: Tensor, images: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (dim, _, patch_size, _), (num_prefix, needed) = weight.shape, rest[-2:]
    num_cells = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    return empty_of(needed, grad, (images.shape, weight.shape, (dim,), (num_cells, dim), (num_prefix, dim)))


def _setup_merge_tokens(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cu_seqlens, cells, rows, cols, prefix, _ = inputs
    ctx.save_for_backward(cu_seqlens, cells)
    ctx.rows, ctx.cols, ctx.num_prefix = rows, cols, None if prefix is None else prefix.shape[0]


def _merge_tokens_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cu_seqlens, cells = ctx.saved_tensors
    tokens, prefix = _merge_tokens_backward(grad, cu_seqlens, cells, ctx.rows, ctx.cols, ctx.num_prefix or 0)
    return tokens, None, None, None, None, None if ctx.num_prefix is None else prefix, None


_merge_patches_backward = define(
    "merge_patches_backward(Tensor grad, Tensor cu_seqlens, Tensor cells, SymInt[] image_shape, SymInt patch_size, "
    "bool bilinear, Tensor? std) -> Tensor",
    module="merge",
    fake=lambda grad, cu_seqlens, cells, image_shape, patch_size, bilinear, std: grad.new_empty(image_shape),
)
_merge_patches = define(
    "merge_patches(Tensor images, Tensor cu_seqlens, Tensor cells, SymInt patch_size, bool bilinear, Tensor? mean, "
    "Tensor? std, bool fill_tail) -> Tensor",
    module="merge",
    fake=lambda images, cu_seqlens, cells, patch_size, *_: images.new_empty(
        cells.shape[0],
        images.shape[1] * patch_size**2,
        dtype=torch.float32 if images.dtype == torch.uint8 else images.dtype,
    ),
    setup_context=_setup_merge_patches,
    backward=_merge_patches_gradients,
)
_embed_patches_backward = define(
    "embed_patches_backward(Tensor grad, Tensor images, Tensor weight, Tensor? mean, Tensor? std, Tensor cu_seqlens, "
    "Tensor cells, bool bilinear, SymInt num_prefix, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    module="merge",
    fake=_fake_embed_backward,
)
_embed_patches = define(
    "embed_patches(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? mean, "
    "Tensor? std, Tensor cu_seqlens, Tensor cells, bool bilinear, bool trimmed, bool fill_tail, SymInt? expected_tokens) "
    "-> Tensor",
    module="merge",
    fake=lambda images, weight, *rest: weight.new_empty(rest[6].shape[0], weight.shape[0]),
    setup_context=_setup_embed_patches,
    backward=_embed_patches_gradients,
)
_merge_tokens_backward = define(
    "merge_tokens_backward(Tensor grad, Tensor cu_seqlens, Tensor cells, SymInt rows, SymInt cols, SymInt num_prefix) "
    "-> (Tensor, Tensor)",
    module="merge",
    fake=lambda grad, cu_seqlens, cells, rows, cols, num_prefix: (
        grad.new_empty(cu_seqlens.shape[0] - 1, rows * cols, grad.shape[1]),
        grad.new_empty(num_prefix, grad.shape[1]),
    ),
)
_merge_tokens = define(
    "merge_tokens(Tensor tokens, Tensor cu_seqlens, Tensor cells, SymInt rows, SymInt cols, Tensor? prefix, bool fill_tail) "
    "-> Tensor",
    module="merge",
    fake=lambda tokens, cu_seqlens, cells, *_: tokens.new_empty(cells.shape[0], tokens.shape[2]),
    setup_context=_setup_merge_tokens,
    backward=_merge_tokens_gradients,
)
