"""Awkward tensors to feed an operation, and the rules its results are held to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from step_kernels import SupertokenLayout

LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
TIGHT = 1e-12  # fp64 against fp64: a few hundred roundings of values around one


@contextlib.contextmanager
def matmuls_in(precision: str) -> Iterator[None]:
    """fp32 products in tf32 for "tf32"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def poison(tensor: Tensor, live: int) -> Tensor:
    """A copy whose rows past the live count are NaN (or an absurd integer)."""
    result = tensor.detach().clone()
    result[live:] = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return result.requires_grad_(tensor.requires_grad)


def with_tail(rows: Tensor, capacity: int) -> Tensor:
    """Live rows extended to the capacity with NaN."""
    result = rows.new_full((capacity, *rows.shape[1:]), math.nan)
    result[: len(rows)] = rows.detach()
    return result


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """What an op allocates inside starts as NaN (integers as their largest value), so what it does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# Views with a contiguous last dimension


def offset(tensor: Tensor) -> Tensor:
    """Starts in the middle of a larger buffer full of NaN."""
    buffer = tensor.new_full((tensor.numel() + 24,), math.nan)
    view = buffer[8 : 8 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def wide_rows(tensor: Tensor) -> Tensor:
    """The left part of rows twice as wide, the right part being NaN."""
    fill = math.nan if tensor.is_floating_point() else 255
    buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), fill)
    view = buffer[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def every_other_row(tensor: Tensor) -> Tensor:
    """Each second row of a buffer whose other rows are NaN."""
    buffer = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), math.nan)
    view = buffer[::2]
    view.copy_(tensor)
    return view


def swapped(tensor: Tensor) -> Tensor:
    """The first two dimensions stored the other way round (needs three)."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


ROW_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": offset,
    "wide_rows": wide_rows,
    "every_other_row": every_other_row,
}


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def cropped(images: Tensor) -> Tensor:
    """A window of larger images that are NaN (or 255) elsewhere."""
    batch, channels, height, width = images.shape
    fill = math.nan if images.is_floating_point() else 255
    buffer = images.new_full((batch, channels, height + 3, width + 5), fill)
    view = buffer[:, :, 1 : 1 + height, 2 : 2 + width]
    view.copy_(images)
    return view


def some_channels(images: Tensor) -> Tensor:
    """The first channels of images that have more."""
    return wide_rows(images.movedim(1, -1)).movedim(-1, 1)


IMAGE_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "cropped": cropped,
    "some_channels": some_channels,
    "upside_down_memory": lambda images: images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


# Comparing


def close(result: Tensor, truth: Tensor, tolerance: float = TIGHT) -> None:
    """Equal shapes, and values within a tolerance relative to the largest one."""
    assert result.shape == truth.shape, f"{tuple(result.shape)} instead of {tuple(truth.shape)}"
    if result.numel() == 0:
        return
    scale = max(1.0, float(truth.detach().abs().max()))
    error = float((result.detach().double() - truth.detach().double()).abs().max())
    assert error <= tolerance * scale, f"off by {error:.3e} where values reach {scale:.3e}"


def one_ulp(magnitude: float, dtype: torch.dtype) -> float:
    """Distance to the next number of the dtype at this magnitude."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(magnitude, info.tiny)))


def error_rule(result: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus one ulp of the output's magnitude."""
    assert result.shape == truth.shape and result.dtype == plain.dtype
    if result.numel() == 0:
        return
    truth = truth.detach().double()
    ours = float((result.detach().double() - truth).abs().max())
    theirs = float((plain.detach().double() - truth).abs().max())
    allowed = 2 * theirs + one_ulp(float(truth.abs().max()), result.dtype)
    assert ours <= allowed, f"error {ours:.3e}, plain PyTorch {theirs:.3e}, allowed {allowed:.3e}"


def gradients(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Gradients of <output, cotangent>, zero where an input does not matter (loops over nothing have no graph)."""
    if not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(output, inputs, cotangent, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def identical(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit for bit, but for the sign of zero; NaN equals nothing."""
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def agree(
    result: Tensor, truth: Tensor, inputs: Sequence[Tensor], tolerance: float = TIGHT, of_gradients: float = TIGHT
) -> None:
    """Live rows are the truth's, the tail is zero, and so it is with every gradient, although the cotangent's tail is NaN."""
    live = len(truth)
    close(result[:live], truth, tolerance)
    assert not result[live:].any()
    cotangent = poison(torch.randn_like(result), live)
    expected = gradients(truth, inputs, cotangent[:live])
    for ours, theirs in zip(gradients(result, inputs, cotangent), expected, strict=True):
        close(ours, theirs, of_gradients)


def rule_with_gradients(
    result: Tensor, plain: Tensor, truth: Tensor, inputs: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """``error_rule`` of a result and of the gradients of its inputs; ``exact``: the inputs that the truth was made from."""
    error_rule(result, plain, truth)
    cotangent = torch.randn(truth.shape).to(result.dtype)
    found, rivals = (gradients(x, inputs, cotangent) for x in (result, plain))
    for ours, theirs, true in zip(found, rivals, gradients(truth, exact, cotangent.double()), strict=True):
        error_rule(ours, theirs, true)


def on_grid(padded: Tensor, layout: SupertokenLayout) -> Tensor:
    """Each image's tokens [B, longest, D] at the cells that they cover: [B, num_prefix + rows * cols, D], cell by cell."""
    (rows, cols), prefix = layout.grid, layout.num_prefix
    dense = padded.new_zeros(layout.batch_size, prefix + rows * cols, padded.shape[2])
    starts = layout.cu_seqlens.tolist()
    for number, (image, row, column, side) in enumerate(layout.cells.tolist()):
        position = number - starts[image]
        if side == 0:
            dense[image, position] = padded[image, position]
        for cell in ((row + i) * cols + column + j for i in range(side) for j in range(side)):
            dense[image, prefix + cell] = padded[image, position]
    return dense
