"""Who decides the dtypes of the model layer: its parameters. Neither a cast of the thresholds nor autocast does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn

__all__ = ["ThresholdModule", "without_autocast"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ThresholdModule(nn.Module):
    """A module whose own buffers named ``threshold*`` stay fp32 when the module is cast.

    ``module.to(dtype)`` casts every floating-point buffer, and 0.95 rounded to bf16 is 0.9492: another threshold.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.startswith("threshold")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            cast = self._buffers[name]
            if cast is not None and cast.dtype != torch.float32:
                self._buffers[name] = buffer.to(cast.device)
        return self


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
