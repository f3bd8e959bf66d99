"""Thresholds, and who decides the dtypes of the model layer: its parameters. Neither a cast of the thresholds nor autocast does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checks import check_number

__all__ = ["ThresholdModule", "without_autocast"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ThresholdModule(nn.Module):
    """A module whose own buffers named ``threshold*`` stay fp32 when the module is cast, and take numbers.

    ``module.to(dtype)`` casts every floating-point buffer, and 0.95 rounded to bf16 is 0.9492: another threshold. ``module.threshold = 0.9`` checks
    the number and fills the buffer in place, so that CUDA graphs and folded copies follow. ``load_state_dict`` checks it, too.
    """

    threshold_limit: ClassVar[float | None] = 1.0  # thresholds are probabilities; None: they have no upper limit
    settings: ClassVar[tuple[str, ...]] = ()  # attributes that repr shows

    def add_threshold(self, name: str, value: object) -> None:
        """Register the fp32 buffer ``name`` that holds ``value``."""
        self.register_buffer(name, torch.tensor(self.checked_threshold(name, value), dtype=torch.float32))

    def checked_threshold(self, name: str, value: object) -> float | list[float]:
        """What the buffer ``name`` is to hold."""
        return check_number(name, value, minimum=0, maximum=self.threshold_limit)

    def __setattr__(self, name: str, value: Any) -> None:
        buffer = self.__dict__.get("_buffers", {}).get(name) if name.startswith("threshold") else None
        if buffer is None or isinstance(value, Tensor):  # as `load_state_dict` assigns them
            super().__setattr__(name, value)
        else:
            buffer.copy_(torch.tensor(self.checked_threshold(name, value), device="cpu"))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name) if name.startswith("threshold") else None
            if buffer is not None and value is not None and value.shape == buffer.shape and not value.is_meta:
                self.checked_threshold(prefix + name, value.tolist())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The settings in one line; reads thresholds from their device."""
        return ", ".join(f"{name}={shown(getattr(self, name))}" for name in self.settings)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.startswith("threshold")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            cast = self._buffers[name]
            if cast is not None and cast.dtype != torch.float32:
                self._buffers[name] = buffer.to(cast.device)
        return self


def shown(value: object) -> str:
    """A setting in a repr: of a tensor its numbers, to six digits, or where they are on no device "?"."""
    if not isinstance(value, Tensor):
        return repr(value)
    numbers = ["?"] if value.is_meta else [f"{number:.6g}" for number in value.flatten().tolist()]
    return f"({', '.join(numbers)})" if value.ndim else numbers[0]


def without_autocast(forward: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a module's ``forward`` compute in its parameters' dtype, as the ragged ops do, also under ``torch.autocast``.

    Autocast would cast the few plain matmuls between the ops and leave the ops alone: rows of two dtypes would meet.
    """

    @functools.wraps(forward)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        device_type = next(cast(nn.Module, args[0]).parameters()).device.type
        # "meta" has no autocast. (Asking PyTorch which devices have one does not compile under torch 2.11.)
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return forward(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return forward(*args, **kwargs)

    return run
