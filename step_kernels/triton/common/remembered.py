"""Launches like one that was made before go straight to its compiled kernel.

Triton binds and specialises arguments anew at each launch, and a launcher chooses its tiles: half of what a launch costs the host. All that a
kernel is passed, but for addresses, follows from shapes, strides, dtypes, alignment and numbers: the key of what is remembered. Hooks around
launches are called as ever; Triton's settings for its compiler count where a launch is not yet remembered.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuned
from .launch import OPTIONS
from .operands import Descriptor

DEVICE = "cuda"  # in the interpreter nothing is compiled; ahead of time kernels are, but not to be launched
MOST = 4096  # then all is forgotten: live counts differ from batch to batch

Operands = tuple[Tensor | None, ...]
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]  # kernel, grid, arguments, named arguments


class _Known(NamedTuple):
    """How arguments are picked from a pool: of the launch's tensors, then what is derived from these, then constants."""

    run: Callable[..., None]
    derived: list[Callable[[list[Any]], Any]]
    constants: list[Any]
    pick: Callable[[list[Any]], tuple[Any, ...]]


_known: dict[Hashable, _Known | None] = {}  # None: made once, as many are that no other follows


def launch(plan: Callable[..., Launch], made: Operands, given: Operands, *numbers: Hashable) -> None:
    """Launch the kernel that ``plan(*made, *given, *numbers)`` names, on the current device.

    Args:
        plan: a pure function of the tensors' shapes, strides, dtypes, device, alignment to 16 bytes, and of the numbers: it reads no
            setting that may change. What it passes on are these tensors themselves, descriptors of them, tuples of several, and constants.
        made: results just allocated, which ``given`` and ``numbers`` say all about.
        given: other tensors; the first is not None.
        numbers: all else that the launch depends on.
    """
    first = given[0]
    key = (
        plan, numbers, first.device,  # type: ignore[union-attr]
        *[x if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0) for x in given],
    )  # fmt: skip
    settled = tuned.settled()
    known = _known.get(key) if settled else None
    if known is not None:
        pool = [*made, *given]
        for derive in known.derived:
            pool.append(derive(pool))
        known.run(*known.pick(pool + known.constants))
        return
    kernel, grid, arguments, named = plan(*made, *given, *numbers)
    compiled = kernel[grid](*arguments, **named, **OPTIONS)
    if settled and isinstance(compiled, CompiledKernel) and first.device.type == DEVICE:  # type: ignore[union-attr]
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = _learned(compiled, plan, (*made, *given), numbers) if key in _known else None


def _learned(
    compiled: CompiledKernel, plan: Callable[..., Launch], tensors: Operands, numbers: tuple[Hashable, ...]
) -> _Known:
    own = [None if x is None else x.detach() for x in tensors]  # an object each: one tensor may have been passed twice
    kernel, grid, arguments, named = plan(*own, *numbers)
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    place = {id(x): index for index, x in enumerate(own)}
    derived: list[Callable[[list[Any]], Any]] = []
    constants: list[Any] = []  # at the pool's end, the first last
    picked = []
    for value in [bound[name] for name in kernel.arg_names]:
        if isinstance(value, Tensor):
            picked.append(place[id(value)])
        elif isinstance(value, TensorDescriptor):
            picked.append(len(own) + len(derived))
            derived.append(_descriptor_like(value, place[id(value.base)]))
        elif isinstance(value, tuple) and any(isinstance(x, (Tensor, TensorDescriptor)) for x in value):
            picked.append(len(own) + len(derived))
            derived.append(operator.itemgetter(*[place[id(x)] for x in value]))
        else:
            constants.insert(0, value)
            picked.append(-len(constants))
    return _Known(compiled[(*grid, 1, 1)[:3]], derived, constants, operator.itemgetter(*picked))


def _descriptor_like(other: TensorDescriptor, index: int) -> Callable[[list[Any]], TensorDescriptor]:
    shape, strides, block = other.shape, other.strides, other.block_shape  # not ``other``, which holds a tensor
    return lambda pool: Descriptor(pool[index], shape, strides, block)
