"""What the interpreter is watched for: addresses outside every argument, dependence on program order, launches that did not happen.

Every enabled lane of every load, store and atomic must fall inside one tensor argument of the launch (the view's exact extent, not its
storage's). Masked-off lanes do not count, as on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

launches: list[str] = []  # names of the kernels that ran, in order; tests clear it


class OutOfBounds(IndexError):
    """A kernel touched memory that is not an argument's."""


class _State:
    extents = np.zeros((0, 2), np.int64)  # [n, 2]: first and last + 1 byte of each argument, sorted
    seed: int | None = None


def shuffle_programs(seed: int | None) -> None:
    """Run the programs of later launches in a random order; None: in ascending order."""
    _State.seed = seed


def install() -> None:
    """Patch the interpreter of this process; call once."""
    _wrap_memory_access("create_masked_load", "load", mask_position=0)
    _wrap_memory_access("create_masked_store", "store", mask_position=1)
    _wrap_memory_access("create_atomic_cas", "atomic", mask_position=None)
    _wrap_atomic_rmw()
    _wrap_launch()
    _wrap_program_order()


def check(what: str, pointers: Any, mask: Any) -> None:
    """Raise OutOfBounds unless every enabled lane lies inside an argument and is aligned to its type."""
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = np.asarray(pointers.data).astype(np.int64).ravel()
    if mask is not None:
        enabled = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointers.data)).ravel()
        addresses = addresses[enabled]
    if not addresses.size:
        return
    extents = _State.extents
    low, high = addresses.min(), addresses.max()
    home = int(np.searchsorted(extents[:, 0], low, side="right")) - 1
    if home >= 0 and high + size <= extents[home, 1] and not np.bitwise_or.reduce(addresses) & (size - 1):
        return  # all in one argument, as nearly always
    owner = np.searchsorted(extents[:, 0], addresses, side="right") - 1
    bad = (owner < 0) | (addresses % size != 0)
    if len(extents):
        bad |= addresses + size > extents[np.maximum(owner, 0), 1]
    if bad.any():
        raise OutOfBounds(_report(what, size, addresses, bad))


def _report(what: str, size: int, addresses: np.ndarray, bad: np.ndarray) -> str:
    first = int(addresses[bad][0])
    text = f"{what} of {size} bytes: {int(bad.sum())} of {addresses.size} lanes outside every argument"
    if len(_State.extents):
        nearest = _State.extents[int(np.abs(_State.extents - first).min(1).argmin())]
        text += f"; the first is {first - int(nearest[0])} bytes from the start of an argument of {int(nearest[1] - nearest[0])}"
    return f"{text} (program {interpreter.interpreter_builder.grid_idx})"


def _extents(arguments: Any) -> Iterator[tuple[int, int]]:
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            yield from _extents(argument)
            continue
        if isinstance(argument, TensorDescriptor):
            argument = argument.base
        argument = getattr(argument, "base", argument) if type(argument).__name__ == "TensorWrapper" else argument
        if isinstance(argument, torch.Tensor) and argument.numel():
            last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
            yield argument.data_ptr(), argument.data_ptr() + (last + 1) * argument.element_size()


def _merged(extents: list[tuple[int, int]]) -> np.ndarray:
    """Overlapping views (q, k and v of one qkv) become one extent; neighbours stay apart."""
    merged: list[list[int]] = []
    for start, stop in sorted(extents):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    return np.array(merged, np.int64).reshape(-1, 2)


def _wrap_memory_access(method: str, what: str, *, mask_position: int | None) -> None:
    wrapped = getattr(InterpreterBuilder, method)

    def access(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
        mask = None
        if mask_position is not None:
            mask = rest[mask_position] if len(rest) > mask_position else named.get("mask")
        check(what, pointers, mask)
        return wrapped(self, pointers, *rest, **named)

    setattr(InterpreterBuilder, method, access)


def _wrap_atomic_rmw() -> None:
    wrapped = InterpreterBuilder.create_atomic_rmw

    def access(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("atomic", pointers, mask)
        return wrapped(self, operation, pointers, value, mask, *rest)

    InterpreterBuilder.create_atomic_rmw = access


def _wrap_launch() -> None:
    prepare, call = GridExecutor._init_args_hst, GridExecutor.__call__

    def prepared(self: Any, arguments: Any, named: Any) -> Any:
        host, host_named = prepare(self, arguments, named)
        _State.extents = _merged(list(_extents([*host, *host_named.values()])))
        return host, host_named

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        launches.append(self.fn.__name__)
        return call(self, *arguments, **named)

    GridExecutor._init_args_hst, GridExecutor.__call__ = prepared, counted


def _wrap_program_order() -> None:
    set_dimensions, set_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

    def dimensions(self: Any, nx: int, ny: int, nz: int) -> None:
        set_dimensions(self, nx, ny, nz)
        self.order = None
        if _State.seed is not None:
            self.order = list(range(nx * ny * nz))
            random.Random(_State.seed).shuffle(self.order)

    def index(self: Any, x: int, y: int, z: int) -> None:
        if getattr(self, "order", None) is not None:
            _, ny, nz = self.grid_dim
            program = self.order[(x * ny + y) * nz + z]
            x, y, z = program // (ny * nz), (program // nz) % ny, program % nz
        set_index(self, x, y, z)

    InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = dimensions, index
