"""Which tensors are on the device: those whose storage is marked; and the memory that they take."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes; PyTorch's allocator rounds up to these
_local = threading.local()
_lock = threading.RLock()


class Mark(NamedTuple):
    storage: StorageWeakRef  # while it is held, the address is nobody else's
    nbytes: int
    pooled: bool  # allocated while a graph was recorded: in the graph's pool


_marks: dict[int, Mark] = {}
_peak: int | None = None  # None: nobody has asked for it


def tensors_in(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def key_of(tensor: Tensor) -> int | None:
    """What names a tensor's storage; None for tensors without one."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def on_device(tensor: Tensor) -> bool:
    return key_of(tensor) in _marks and not getattr(_local, "hidden", False)


def pooled(tensor: Tensor) -> bool:
    mark = _marks.get(key_of(tensor) or 0)
    return mark is not None and mark.pooled


def mark(tensor: Tensor, *, pooled: bool = False) -> None:
    """Its storage is on the device from now on."""
    global _peak
    key = key_of(tensor)
    with _lock:
        if key is None or key in _marks:
            return
        storage = tensor.untyped_storage()
        _marks[key] = Mark(StorageWeakRef(storage), -(-storage.nbytes() // BLOCK) * BLOCK, pooled)
        if _peak is not None:
            _peak = max(_peak, allocated())
        elif len(_marks) % 256 == 0:
            _forget_the_dead()


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """In this thread every tensor is an ordinary one of the CPU, and no mode looks on: how references and replays compute."""
    before, _local.hidden = getattr(_local, "hidden", False), True
    try:
        with _disable_current_modes(), torch.no_grad():
            yield
    finally:
        _local.hidden = before


def allocated() -> int:
    """Bytes of living tensors. A graph's pool holds more than those of its results, so it counts as reserved alone."""
    with _lock:
        _forget_the_dead()
        return sum(mark.nbytes for mark in _marks.values() if not mark.pooled)


def reserved() -> int:
    with _lock:
        return allocated() + sum(mark.nbytes for mark in _marks.values() if mark.pooled)


def reset_peak() -> None:
    global _peak
    _peak = allocated()


def peak() -> int:
    """Since `reset_peak`; watching costs time at every allocation, so this ends it."""
    global _peak
    found, _peak = max(_peak or 0, allocated()), None
    return found


def _forget_the_dead() -> None:
    for key in [key for key, mark in _marks.items() if mark.storage.expired()]:
        del _marks[key]
