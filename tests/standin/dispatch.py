"""Every operation on tensors: what it may mix, when it waits, where its results are, and its place in a graph."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from . import graphs, marks
from .rivals import BACKEND, RIVALS
from .syncs import waits

CPU = torch.device("cpu")
# Their results' values or sizes are read on the host.
SYNCHRONIZING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount",
    "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
}  # fmt: skip
WRITES = {"copy_", "_foreach_copy_", "set_"}  # what they return is where it was
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
MOVING = threading.local()  # .explicitly: Python named the device of an aten::_to_copy


class StandIn(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        tensors = marks.tensors_in((args, kwargs))
        here = [marks.on_device(x) for x in tensors]
        target = device_of_result(name, any(here), args, kwargs)
        if any(here):
            refuse_mixtures(name, tensors, here)
        for reason in reasons_to_wait(name, tensors, here, target, args, kwargs):
            waits(reason)
        graph = graphs.recording() if target or any(here) else None
        if func.namespace == "step_kernels":  # its own Python, under this mode
            with self:
                result = func.redispatch(BACKEND, *args, **kwargs)
            graph = None  # launches.py has recorded it
        else:
            args, kwargs = tree_map(on_cpu, (args, kwargs))
            call = functools.partial(RIVALS.get(name, func), *args, **kwargs)
            if graph is not None:
                graph.writes(written(func._schema, args, kwargs))
            result = call()
        if target:
            for x in marks.tensors_in(result):
                marks.mark(x, pooled=graphs.recording() is not None)
        if graph is not None and not getattr(func, "is_view", False):
            graph.record(call, result)
        return result


def on_cpu(argument: Any) -> Any:
    return CPU if isinstance(argument, torch.device) else argument


def written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Which of an operation's tensors it changes."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    changed = [
        given.get(one.name) for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write
    ]
    return marks.tensors_in(changed)


def device_of_result(name: str, here: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether new results are on the device: that of the inputs, or the one named.

    C++ too names a device, that of a tensor, which it takes for the CPU: then a copy changes the dtype alone, and ``new_...``
    and ``..._like`` stay where the tensor is. A move is told from that by `MOVING`.
    """
    if name in WRITES:
        return False
    named = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
    if not named:
        return here
    by_tensor = name == "_to_copy" or name.startswith("new_") or name.endswith("_like")
    if here and by_tensor and not getattr(MOVING, "explicitly", False):
        return True
    return named[0].type == "cuda"


def refuse_mixtures(name: str, tensors: list[Tensor], here: list[bool]) -> None:
    """RuntimeError where CUDA raises it. Tensors of no dimension may come from the CPU, and so may indices."""
    if name in WRITES or name == "_to_copy":
        return
    if name in INDEXING:  # of self, indices and values, only the indices
        strangers = [] if here[0] else [tensors[0]]
    else:
        # Those of no elements are C++'s own, as gradients of an empty image, which it takes for the CPU's.
        strangers = [x for x, own in zip(tensors, here, strict=True) if not own and x.ndim and x.numel()]
    if strangers:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}, on the CPU: {[tuple(x.shape) for x in strangers]})"
        )


def reasons_to_wait(
    name: str, tensors: list[Tensor], here: list[bool], target: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[str]:
    """Why this operation waits for the device; none when it does not."""
    if name == "copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return [name] if blocking and here[0] != here[1] else []
    if name == "_foreach_copy_":
        return [name] if any(here) and not all(here) else []
    if name == "_to_copy":
        return [name] if not kwargs.get("non_blocking", False) and here[0] != target else []
    if not any(here):
        return []
    if name in SYNCHRONIZING:
        return [name]
    if name == "repeat_interleave" and len(tensors) == 1 and kwargs.get("output_size") is None:
        return [f"{name} without output_size"]
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        reasons = [f"{name} with a mask"] * any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        return reasons + [f"{name} with indices on the CPU"] * (not all(map(marks.on_device, indices)))
    return []
