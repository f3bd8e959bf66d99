"""Checks of packed tensors: against a layout, or the ``cu_seqlens`` given by hand in its place, whose rows they hold."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .checks import Size, check_device, check_int, check_tensor
from .layout import SupertokenLayout
from .validation import validate_cu_seqlens, validate_max_seqlen


def check_layout(layout: object, like_name: str, like: Tensor) -> SupertokenLayout:
    """``layout`` if it is one, on the device of ``like``; checks its values too under ``STEP_KERNELS_CHECK=1``."""
    if not isinstance(layout, SupertokenLayout):
        raise TypeError(f"layout: expected a SupertokenLayout, got {checks.describe(layout)}")
    if not isinstance(like, Tensor):
        raise TypeError(f"{like_name}: expected a tensor, got {checks.describe(like)}")
    check_device("layout", layout.cu_seqlens, like.device, like_name)
    if checks.values():
        layout.validate()
    return layout


def check_rows(name: str, x: Tensor, shape: tuple[Size, ...], layout: SupertokenLayout | None) -> Tensor | None:
    """x of that shape, whose rows are those of the layout; the cu_seqlens that tell the live ones, None when all are."""
    if layout is None:
        check_tensor(name, x, shape, contiguous_last=True)
        return None
    check_layout(layout, name, x)
    check_tensor(name, x, (layout.capacity, *shape[1:]), contiguous_last=True)
    return None if layout.trimmed else layout.cu_seqlens


def check_segments(given: object, name: str, x: Tensor) -> Tensor:
    """The cu_seqlens of x's rows [T, ...]: a layout's, or given by hand."""
    if not isinstance(given, SupertokenLayout):
        cu_seqlens = check_cu_seqlens(given, x.shape[0])
        check_device("cu_seqlens", cu_seqlens, x.device, name)
        return cu_seqlens
    check_layout(given, name, x)
    if x.shape[0] != given.capacity:
        raise ValueError(f"{name}: expected {given.capacity} rows, as many as the layout's capacity, got {x.shape[0]}")
    return given.cu_seqlens


def check_cu_seqlens(value: object, rows: int) -> Tensor:
    """Where images start among ``rows``, int32 [B + 1], given by hand. Values are checked where that takes no sync."""
    if not isinstance(value, Tensor):
        raise TypeError(f"cu_seqlens: expected a SupertokenLayout or a tensor [B + 1], got {checks.describe(value)}")
    check_tensor("cu_seqlens", value, ("B + 1",), dtypes=(torch.int32,), contiguous_last=True)
    if value.shape[0] < 1:
        raise ValueError("cu_seqlens: expected at least 1 entry (B + 1), got 0")
    if checks.values() or checks.readable(value):
        validate_cu_seqlens("cu_seqlens", value, rows)
    return value


def check_longest(max_seqlen: object, given: Tensor | SupertokenLayout) -> int:
    """The bound on the tokens of one image: given beside a cu_seqlens, the layout's own beside a layout."""
    if isinstance(given, SupertokenLayout):
        check_none_beside_layout("max_seqlen", max_seqlen)
        return given.max_seqlen
    longest = check_int("max_seqlen", max_seqlen, minimum=0)
    if checks.values() or checks.readable(given):
        validate_max_seqlen(given, longest)
    return longest


def check_none_beside_layout(name: str, value: object) -> None:
    """What a layout knows by itself must not be given as well."""
    if value is not None:
        raise TypeError(f"{name}: expected none beside a layout, which has its own, got {checks.describe(value)}")
