"""Tensors and factories in Python: what they say of their device, and moves between it and the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import marks
from .dispatch import CPU, MOVING
from .graphs import DEVICE
from .syncs import waits

_base = torch._C.TensorBase
_storage_clone = torch.UntypedStorage.clone
_tensor = torch.tensor
_generator = torch.Generator


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None, non_blocking: bool, **named: Any) -> Tensor:
    """A copy on the other device; its gradient comes back."""
    MOVING.explicitly = True
    try:
        return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking, **named)
    finally:
        MOVING.explicitly = False


def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    given = {name: value for name, value in kwargs.items() if name != "copy"}
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **given)
    here = marks.on_device(self)
    if device is None or (device.type == "cuda") == here or device.type not in ("cpu", "cuda"):
        if device is not None and device.type != "meta":
            more = {name: kwargs[name] for name in ("copy", "memory_format") if name in kwargs}
            return _base.to(self, dtype if dtype is not None else self.dtype, **more)
        return _base.to(self, *args, **kwargs)
    if device.index:
        raise RuntimeError("CUDA error: invalid device ordinal")
    named = {} if memory_format is None else {"memory_format": memory_format}
    return moved(self, device, dtype, non_blocking, **named)


def cpu(self: Tensor, **named: Any) -> Tensor:
    return to(self, CPU, **named)


def cuda(self: Tensor, device: Any = None, non_blocking: bool = False, **named: Any) -> Tensor:
    return to(self, DEVICE if device is None else torch.device("cuda", device), non_blocking=non_blocking, **named)


def tolist(self: Tensor) -> Any:
    if marks.on_device(self):
        waits("tolist")
    return _base.tolist(self)


def numpy(self: Tensor, **named: Any) -> Any:
    if marks.on_device(self):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
        )
    return _base.numpy(self, **named)


def clone_storage(self: torch.UntypedStorage) -> torch.UntypedStorage:
    """What ``copy.deepcopy`` of a tensor calls."""
    copied = _storage_clone(self)
    if self._cdata in marks._marks:
        marks.mark(torch.empty(0, dtype=torch.uint8).set_(copied))
    return copied


def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **named: Any) -> Tensor:
    made = _tensor(data, dtype=dtype, **named)
    return (made if device is None else to(made, device)).requires_grad_(requires_grad)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        return tensor(data, dtype=dtype, device=device)
    return to(data, data.device if device is None else device, data.dtype if dtype is None else dtype)


def new_tensor(
    self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    dtype, device = dtype or self.dtype, self.device if device is None else device
    return tensor(data, dtype=dtype, device=device, requires_grad=requires_grad)


class Generator(_generator):
    """One of the device draws what one of the CPU would."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


def install() -> None:
    Tensor.device = property(lambda self: DEVICE if marks.on_device(self) else _base.device.__get__(self))
    Tensor.is_cuda = property(marks.on_device)
    Tensor.get_device = lambda self: 0 if marks.on_device(self) else -1
    Tensor.pin_memory = lambda self: self
    for method in (to, cpu, cuda, tolist, numpy, new_tensor):
        setattr(Tensor, method.__name__, method)
    torch.UntypedStorage.clone = clone_storage
    torch.tensor, torch.as_tensor, torch.Generator = tensor, as_tensor, Generator
