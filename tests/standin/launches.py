"""What stands in for kernels. An op that is to run as kernels returns what its reference computes; with ``really``, its launcher goes first.

That launcher runs as it would, and so does Triton: arguments are bound and specialised, keys looked up, grids computed. Only then, where
Triton would compile and where it would launch, there is a `Kernel` that looks at what it is given.
"""

from __future__ import annotations

import collections
import functools
import importlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from aot.ahead_of_time import FakeDriver
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from step_kernels import library

from . import dispatch, graphs, marks
from .loaded import Loaded

ARCHITECTURE = 90
LARGEST_GRID = (2**31 - 1, 65535, 65535)
variants: collections.Counter[str] = collections.Counter()  # what Triton would have compiled, by kernel
launched: collections.Counter[str] = collections.Counter()
problems: list[str] = []  # of the running test, which fails by them whoever caught the exception


def fail(problem: str) -> None:
    problems.append(problem)
    raise AssertionError(problem)


class Kernel(Loaded):
    """It looks at what it is given."""

    def run(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, data: Any, *rest: Any) -> None:
        launched[self.name] += 1
        if not all(1 <= size <= most for size, most in zip((x, y, z), LARGEST_GRID, strict=True)):
            fail(f"{self.name}: a grid of {(x, y, z)}")
        for argument in leaves(rest[2:]):
            if isinstance(argument, TensorDescriptor):
                for wrong in wrong_with(argument):
                    fail(f"{self.name}: a descriptor with {wrong}")
                argument = argument.base
            if isinstance(argument, Tensor) and not marks.on_device(argument):
                fail(f"{self.name}: a pointer to the CPU, {argument.dtype} {list(argument.shape)}")


def leaves(arguments: Iterable[Any]) -> Iterable[Any]:
    for argument in arguments:
        yield from leaves(argument) if isinstance(argument, (tuple, list)) else (argument,)


def wrong_with(given: TensorDescriptor) -> list[str]:
    """What cuTensorMapEncodeTiled refuses, by cuda.h: its documentation of globalAddress, globalDim, globalStrides and boxDim."""
    size = given.base.element_size()
    *outer, last = [stride * size for stride in given.strides]
    wrong = [f"address {given.base.data_ptr():#x}"] * bool(given.base.data_ptr() % 16)
    wrong += [f"{len(given.shape)} dimensions"] * (not 1 <= len(given.shape) <= 5)
    wrong += [f"a dimension of {length}" for length in given.shape if not 1 <= length <= 2**32]
    wrong += [f"a stride of {stride} bytes" for stride in outer if stride % 16 or not 0 <= stride < 2**40]
    wrong += [f"a last stride of {last} bytes"] * (last != size)
    pairs = itertools.pairwise(outer)
    wrong += [f"strides of {stride} and {inner} bytes" for stride, inner in pairs if inner == 0 or stride % inner]
    wrong += [f"a box of {length}" for length in given.block_shape if not 1 <= length <= 256]
    return wrong + [f"an inner box of {given.block_shape[-1]}"] * bool(given.block_shape[-1] * size % 16)


def compile_nothing(self: JITFunction, key: Any, signature: Any, device: int, *rest: Any, **named: Any) -> Kernel:
    name = f"{self.fn.__module__.removeprefix('step_kernels.triton.')}.{self.fn.__name__}"
    variants[name] += 1
    kernel = self.device_caches[device][0][key] = Kernel(name)
    return kernel


compile_really = JITFunction._do_compile


def compile_for_the_cache(self: JITFunction, key: Any, signature: Any, device: int, *rest: Any, **named: Any) -> Kernel:
    """Into Triton's cache, where a GPU of this architecture, with this Triton, finds it."""
    compile_really(self, key, signature, device, *rest, **named)
    return compile_nothing(self, key, signature, device)


def standing_in(
    op: str, launcher: Callable[..., Any], reference: Callable[..., Any], really: bool
) -> Callable[..., Any]:
    schema = getattr(torch.ops.step_kernels, op).default._schema

    def launch(*args: Any) -> Any:
        graph = graphs.recording()
        if graph is not None:
            graph.writes(dispatch.written(schema, args, {}))
        if really:
            with graphs.paused():
                ours = described(launcher(*args))
        call = functools.partial(hidden_call, reference, *args)
        result = call()
        for x in marks.tensors_in(result):
            marks.mark(x, pooled=graph is not None)
        if really:
            compare(op, ours, described(result))
        if graph is not None:
            graph.record(call, result)
        return result

    return launch


def hidden_call(function: Callable[..., Any], *args: Any) -> Any:
    with marks.hidden():
        return function(*args)


def compare(op: str, ours: list[Any], expected: list[Any]) -> None:
    """The launcher's results are like the reference's, but for their values."""
    if ours != expected:
        fail(f"{op}: its launcher returns {ours}, its reference {expected}")


def described(result: Any) -> list[Any]:
    """dtype, shape and strides of each tensor. Strides of dimensions of size 1, and of empty tensors, mean nothing."""
    found = []
    for x in marks.tensors_in(result):
        strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]
        found.append((x.dtype, tuple(x.shape), strides))
    return found


def install(mode: str) -> None:
    driver.set_active(FakeDriver(ARCHITECTURE))
    JITFunction._do_compile = compile_for_the_cache if mode == "compile" else compile_nothing
    for op, name in library.op_modules.items():
        module = importlib.import_module(f"step_kernels.triton.{name}")
        reference = getattr(importlib.import_module(f"step_kernels.reference.{name}"), op)
        setattr(module, op, standing_in(op, getattr(module, op), reference, mode != "reference"))
