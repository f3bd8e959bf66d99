"""Checks of arguments: ValueError or TypeError naming the argument, what was expected and what came.

They read shapes, dtypes and devices, and of a CPU the values of ``cu_seqlens`` given by hand: so they cost no device sync and trace under
torch.compile. ``STEP_KERNELS_CHECK=1``, read once, adds the checks of values that need one: see ``SupertokenLayout.validate``.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_SIDE = 64
MAX_HEAD_DIM = 256
SIDES = (1, 2, 4, 8, 16, 32, 64)
MAX_CAPACITY = 2**31 - 2**23  # rows are int32 on the device, and kernels step past the last one by a block
Tail = Literal["zero", "undefined"]
TAILS = get_args(Tail)

Size = int | str | None


def switched_on(variable: str, value: str | None) -> bool:
    """Whether an environment variable's value is 1. Unset and empty are 0; anything else is refused."""
    if value not in (None, "", "0", "1"):
        raise ValueError(f"environment variable {variable}: expected 0 or 1, got {value!r}")
    return value == "1"


# Once: reading the environment takes longer than all checks of a small op.
_values_asked_for = switched_on("STEP_KERNELS_CHECK", os.environ.get("STEP_KERNELS_CHECK"))


def values() -> bool:
    """Whether to check values, too. Not inside torch.compile: a graph cannot branch on them."""
    return _values_asked_for and not torch.compiler.is_compiling()


def readable(x: Tensor) -> bool:
    """Whether values are there to be read without waiting: on a CPU, outside torch.compile, in no fake or other subclass."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def describe(value: object) -> str:
    """What came, in a message: dtype and shape of a tensor or array, type and a short form of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    text = reprlib.repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[Size],
    *,
    dtypes: Sequence[torch.dtype] = FLOATING,
    like: Tensor | None = None,
    like_name: str = "",
    contiguous_last: bool = False,
) -> Tensor:
    """``value`` if it is a tensor of that shape and one of those dtypes.

    Args:
        name: the argument's name.
        value: what the caller passed.
        shape: one entry per dimension: an int (exact), or a name that the message shows (any size).
        dtypes: allowed dtypes; with ``like``, exactly the dtype of ``like``.
        like, like_name: a tensor, and its argument's name, whose dtype and device ``value`` must share.
        contiguous_last: the last dimension must have stride 1.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {_shape_text(shape)}, got {describe(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {kind}")
    found = value.shape
    if not _fits(found, shape):
        raise ValueError(f"{name}: expected shape {_shape_text(shape)}, got {list(found)}")
    if like is not None:
        check_device(name, value, like.device, like_name)
        if value.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype} as {like_name} has, got {value.dtype}")
    elif value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {value.dtype}")
    if contiguous_last and found[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension (stride 1), got strides {list(value.stride())}; "
            f"call {name}.contiguous()"
        )
    return value


def check_optional(name: str, value: object, shape: Sequence[Size], *, like: Tensor, like_name: str) -> Tensor | None:
    """``check_tensor`` for an argument that may be None."""
    if value is None:
        return None
    return check_tensor(name, value, shape, like=like, like_name=like_name)


def check_capacity(batch_size: int, rows: int, cols: int, num_prefix: int) -> None:
    """Rows must fit int32."""
    capacity = batch_size * (num_prefix + rows * cols)
    if capacity > MAX_CAPACITY:
        raise ValueError(f"batch_size * (num_prefix + rows * cols): expected at most {MAX_CAPACITY}, got {capacity}")


def check_head_dim(name: str, x: Tensor) -> None:
    """Of x [..., D]."""
    if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: expected a head dimension between 1 and {MAX_HEAD_DIM}, got {x.shape[-1]}")


def check_device(name: str, value: Tensor, device: torch.device, other: str) -> None:
    """Both on one device."""
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as {other} is, got one on {value.device}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """One of a few fixed values."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_int(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """An int (also symbolic, under torch.compile) in a range."""
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if torch.jit.is_tracing():  # which makes tensors of sizes
            raise RuntimeError("tracing: torch.jit.trace and ONNX's old exporter fix token counts; use torch.export")
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name}: expected an int {limits}, got {value}")
    return value  # type: ignore[return-value]  # a SymInt behaves as an int


def check_number(name: str, value: object, *, minimum: float | None = None, maximum: float | None = None) -> float:
    """An int or float within inclusive bounds, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a float, got {describe(value)}")
    number = float(value)
    if minimum is not None and not number >= minimum:
        raise ValueError(f"{name}: expected a number of at least {minimum:g}, got {number:g}")
    if maximum is not None and not number <= maximum:
        raise ValueError(f"{name}: expected a number of at most {maximum:g}, got {number:g}")
    return number


def check_sides(name: str, value: object) -> tuple[int, ...]:
    """A non-empty sequence of sides of blocks that merge, from 2 on, each once."""
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name}: expected a non-empty list of sides, got {describe(value)}")
    sides = tuple(check_side(f"{name}[{i}]", side, minimum=2) for i, side in enumerate(value))
    if len(set(sides)) != len(sides):
        raise ValueError(f"{name}: expected each side once, got {list(sides)}")
    return sides


def check_side(name: str, value: object, *, minimum: int = 1) -> int:
    """A block's side: a power of two up to 64."""
    side = check_int(name, value, minimum=minimum, maximum=MAX_SIDE)
    if side not in SIDES:
        raise ValueError(f"{name}: expected a power of two between {minimum} and {MAX_SIDE}, got {side}")
    return side


def check_grid(name: str, value: object) -> tuple[int, int]:
    """(rows, cols), both at least 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (rows, cols), got {describe(value)}")
    return check_int(f"{name}[0]", value[0], minimum=1), check_int(f"{name}[1]", value[1], minimum=1)


def check_threshold(name: str, value: object, device: torch.device) -> tuple[float, Tensor | None]:
    """A float, or a 0-dim tensor on ``device``; the pair a registered op takes (number, tensor or None)."""
    if isinstance(value, Tensor):
        check_tensor(name, value, ())
        check_device(name, value, device, "scores")
        return 0.0, value.detach()
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a float or a 0-dim floating-point tensor, got {describe(value)}")
    return check_number(name, value), None


def check_thresholds(thresholds: object, count: int, device: torch.device) -> tuple[list[float], list[Tensor]]:
    """One for all sides, or one for each: floats only -> (floats, []); a device tensor among them -> ([], tensors), without a host read."""
    if isinstance(thresholds, (list, tuple)):
        if len(thresholds) != count:
            raise ValueError(f"thresholds: expected {count} entries, one per side, got {len(thresholds)}")
        pairs = [check_threshold(f"thresholds[{i}]", value, device) for i, value in enumerate(thresholds)]
    else:
        pairs = [check_threshold("thresholds", thresholds, device)] * count
    if all(tensor is None for _, tensor in pairs):
        return [number for number, _ in pairs], []
    return [], [torch.full((), number, device=device) if tensor is None else tensor for number, tensor in pairs]


def check_no_grad(name: str, value: Tensor | None, reason: str) -> None:
    """Refuse an argument that would need a gradient the op does not give."""
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does: {reason}")
    check_no_tangent(name, value)


def check_no_tangent(name: str, value: object) -> None:
    """Refuse an argument of forward-mode differentiation: a missing tangent would pass for a zero."""
    if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name}: expected a tensor without a tangent, got one: no op has a forward-mode derivative"
        )


def check_tail(tail: object) -> bool:
    """True when rows past the live count are to be filled with zeros."""
    check_choice("tail", tail, TAILS)
    return tail == "zero"


def _fits(found: Sequence[int], wanted: Sequence[Size]) -> bool:
    if len(found) != len(wanted):
        return False
    for got, want in zip(found, wanted, strict=False):  # noqa: SIM110  # ``any`` of a generator takes twice as long
        if isinstance(want, int) and got != want:
            return False
    return True


def _shape_text(shape: Sequence[Size]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
