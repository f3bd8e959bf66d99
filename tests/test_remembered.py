"""A launch that goes straight to its compiled kernel passes what Triton would have passed, whatever came before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="launches are Triton's")

from aot.ahead_of_time import FakeDriver
from standin.loaded import Loaded
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import step_kernels as sk
from step_kernels import backend
from step_kernels.triton.common import remembered, tuned
from step_kernels.triton.common.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

ROWS, WIDTH = 20, 64
LAYOUT = sk.SupertokenLayout.uniform(4, (2, 2), num_prefix=1)
STATIC = sk.SupertokenLayout.trusted(LAYOUT.cu_seqlens, LAYOUT.cells, LAYOUT.grid, 1)
BUFFER = torch.randn(2**16)
LAUNCHED: list[Any] = []


class Kernel(Loaded):
    """Launched, it notes what it is given."""

    def run(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, data: Any, *rest: Any) -> None:
        LAUNCHED.append((self.name, (x, y, z), [seen(argument) for argument in rest[2:]]))


def seen(argument: Any) -> Any:
    """What tells a kernel's argument: of results, which are elsewhere each time, all but the address."""
    if isinstance(argument, TensorDescriptor):
        return seen(argument.base), argument.shape, argument.strides, argument.block_shape
    if isinstance(argument, tuple):
        return tuple(seen(each) for each in argument)
    if not isinstance(argument, Tensor):
        return type(argument), argument
    result = argument.untyped_storage().data_ptr() != BUFFER.untyped_storage().data_ptr()
    return argument.dtype, argument.shape, argument.stride(), None if result else argument.data_ptr()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was launched, with a stub in the place of Triton's compiler and the driver; CPU tensors are taken for a GPU's."""

    def compile_nothing(self: JITFunction, key: Any, signature: Any, device: str, *_: Any) -> Kernel:
        return self.device_caches[device][0].setdefault(key, Kernel(f"{self.fn.__name__} {key}"))

    stub = FakeDriver(90)
    stub.get_current_device = lambda: "test_remembered"  # type: ignore[method-assign]
    monkeypatch.setattr(driver, "_active", stub)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(backend, "why_no_triton_on", lambda device: None)
    monkeypatch.setattr(remembered, "DEVICE", "cpu")
    monkeypatch.setattr(remembered, "_known", {})
    precision = torch.backends.cuda.matmul.fp32_precision
    with torch.no_grad(), sk.use_backend("triton"):
        LAUNCHED.clear()
        yield LAUNCHED
    torch.backends.cuda.matmul.fp32_precision = precision


def part(number: int, *shape: int, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory of its own for each number, aligned unless shifted."""
    size = torch.Size(shape).numel()
    return BUFFER.view(dtype)[4096 * number + shift :][:size].view(shape)


def norm(same: bool, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    x, weight, bias = (
        part(0, ROWS, WIDTH, shift=shift, dtype=dtype),
        part(1, WIDTH, dtype=dtype),
        part(2, WIDTH, dtype=dtype),
    )
    sk.ragged_layer_norm(x, weight, weight if same else bias, 1e-6, layout=STATIC)


def attention(same: bool, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    q, k, v = (part(0 if same else i, ROWS, 2, 96, shift=shift, dtype=dtype) for i in range(3))
    sk.ragged_attention(q, k if not same else q, v if not same else q, STATIC.cu_seqlens, 5)


def linear(same: bool, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    x, residual = part(0, ROWS, WIDTH, shift=shift, dtype=dtype), part(3, ROWS, WIDTH, dtype=dtype)
    weight, bias = part(1, WIDTH, WIDTH, dtype=dtype), part(2, WIDTH, dtype=dtype)
    sk.ragged_linear(x, weight, bias, layout=STATIC, residual=x if same else residual)


def exit_head(same: bool, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    x, weight, bias = (
        part(0, ROWS, WIDTH, shift=shift, dtype=dtype),
        part(1, WIDTH, dtype=dtype),
        part(2, WIDTH, dtype=dtype),
    )
    classes, threshold = part(3, WIDTH, WIDTH, dtype=dtype), part(4, dtype=torch.float32)
    sk.exit_head(x, weight, weight if same else bias, classes, None, STATIC, threshold, canvas=part(5, 4, WIDTH, 2, 2))


def halting(same: bool, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    scores, values = part(0, ROWS, WIDTH, shift=shift, dtype=dtype), part(1, ROWS, WIDTH, dtype=dtype)
    sk.halt_tokens(scores, STATIC, 0.5, values=scores if same else values, canvas=part(5, 4, WIDTH, 2, 2))


def gather(same: bool, shift: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    rows, x = part(1, ROWS, dtype=torch.int32), part(0, ROWS, WIDTH, shift=shift, dtype=dtype)
    sk.gather_tokens(x, sk.Halting(STATIC, rows, part(2, ROWS, dtype=torch.bool), part(3, ROWS), rows))


@pytest.mark.parametrize("call", [norm, attention, linear, exit_head, halting, gather])
def test_what_is_passed_is_what_triton_would_pass(call, launched):
    def passed(**how: Any) -> list[Any]:
        launched.clear()
        call(**how)
        return launched.copy()

    def by_triton(**how: Any) -> list[Any]:
        with tuned.forced("no kernel", (0,)):
            return passed(**how)

    for _ in range(2):  # learned from one tensor in two places
        passed(same=True)
    kinds = [{"same": False}, {"same": True}, {"same": False, "shift": 3}, {"same": False, "dtype": torch.float32}]
    for precision in ("ieee", "tf32", "ieee", "tf32", "ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        for kind in kinds:
            assert passed(**kind) == by_triton(**kind)
    assert sum(known is not None for known in remembered._known.values()) >= len(kinds) - 1


def test_rows_being_measured_are_taken(launched):
    for row in [None, None, None, (64, 64, 4, 2), (128, 64, 8, 2), None]:
        with tuned.forced("attention_forward half 96", row) if row else contextlib.nullcontext():
            attention(same=False)
    grids = [grid[0] for _, grid, _ in launched]
    assert grids[3] == 2 * grids[4] and grids[0] == grids[1] == grids[2] == grids[5]
