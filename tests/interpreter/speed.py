"""What makes Triton's interpreter (3.6 to 3.9) several times faster, and changes nothing that it computes or checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor


def install() -> None:
    """Patch the interpreter of this process; call once."""
    _patch_language_once_per_launch()
    _leave_out_checks_without_effect()
    _remember_numpy_dtypes()
    _remember_block_types()
    _remember_shapes()


def _patch_language_once_per_launch() -> None:
    """Each call of a jit function would replace the members of triton.language again, by what they are already."""
    patch_lang, call = interpreter._patch_lang, GridExecutor.__call__
    done: set[int] = set()  # modules whose view of the language this launch has patched

    def patched(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return interpreter._LangPatchScope()
        done.add(module)
        return patch_lang(function)

    def launched(self: Any, *arguments: Any, **named: Any) -> Any:
        done.clear()
        try:
            return call(self, *arguments, **named)
        finally:
            done.clear()  # the language is restored

    interpreter._patch_lang, GridExecutor.__call__ = patched, launched


def _leave_out_checks_without_effect() -> None:
    """Sums of integers are also formed in 64 bits and compared with int32's range, for an assertion that only debug mode makes."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_numpy_dtypes() -> None:
    look_up = interpreter._get_np_dtype  # builds a table of them each time
    known: dict[str, np.dtype] = {}

    def remembered(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered


def _remember_block_types() -> None:
    """Their shapes are tuples of the language: as many objects as dimensions, made anew for each value of a kernel."""
    initialise = tl.block_type.__init__
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def remembered(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            initialise(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    tl.block_type.__init__ = remembered


def _remember_shapes() -> None:
    """The same of the shapes of values."""
    initialise = tl.tensor.__init__
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def remembered(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if isinstance(type, tl.block_type) else ()
        if key not in known:
            initialise(self, handle, type)
            known[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[key]

    tl.tensor.__init__ = remembered
