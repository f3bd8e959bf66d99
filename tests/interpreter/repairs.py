"""Repairs of Triton's interpreter (3.6 to 3.9), without which right kernels look wrong and wrong ones right.

1. bf16 values are kept as bit patterns, and ``tl.dot`` multiplies the patterns (off by 1e9).
2. fp32 -> bf16 truncates, where a GPU rounds to nearest even.
3. Triton 3.6 with numpy >= 2.4: ``range()`` over a loaded bound raises.
4. numpy warns of infinities and NaN in a matmul, which rows past the live count may hold.
5. numpy sums a row's products in an order that, on some CPUs, depends on the row's place in the tile: summed in fp64, the bits do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install() -> None:
    """Patch the interpreter of this process; call once."""
    _repair_bfloat16_and_dot()
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        _repair_loaded_bounds()


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _repair_bfloat16_and_dot() -> None:
    cast_impl = InterpreterBuilder.cast_impl

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(bfloat16_to_float32(handle.data), tl.float32)

    def dot(self: Any, a: TensorHandle, b: TensorHandle, sums: TensorHandle, *rest: Any) -> TensorHandle:
        # Undefined tails take part in tiles; a GPU does not mind them either.
        with np.errstate(invalid="ignore", over="ignore"):
            products = np.matmul(widened(a).data, widened(b).data, dtype=np.float64).astype(sums.data.dtype)
            return TensorHandle(products + sums.data, sums.dtype.scalar)

    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
            wide = widened(source)
            return wide if target.scalar == tl.float32 else cast_impl(self, wide, target)
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            wide = source if source.dtype.scalar == tl.float32 else cast_impl(self, source, tl.float32)
            return TensorHandle(float32_to_bfloat16(wide.data), tl.bfloat16)
        return cast_impl(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast


def _repair_loaded_bounds() -> None:
    patch_lang_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, *rest: Any) -> Any:
        result = patch_lang_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return result

    interpreter._patch_lang_tensor = patched
