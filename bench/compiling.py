"""torch.compile under a budget that all contenders of a run share."""

from __future__ import annotations

import contextlib
import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .kernels.contenders import OutOfTime, in_one_line, time_limit


class CompileBudget:
    """Minutes for the first calls of compiled contenders.

    Args:
        minutes: of all of them together; 0 compiles nothing.
        device: that they run on.

    Attributes:
        spent: seconds so far.
    """

    def __init__(self, minutes: float, device: torch.device) -> None:
        self._minutes, self._device = minutes, device
        self.spent = 0.0

    def spend(self, call: Callable[[], object]) -> str | None:
        """Makes the call for as long as the budget lasts; what went wrong, or None."""
        left = self._minutes * 60 - self.spent
        if left <= 0:
            return f"not compiled: --compile-minutes {self._minutes:g} is used up"
        started = time.monotonic()
        _load_compiler()
        left -= time.monotonic() - started
        try:
            with time_limit(left), _compiling_alone(self._device):
                call()
        except OutOfTime:
            return f"not compiled in what was left of --compile-minutes {self._minutes:g}"
        except Exception as error:  # whatever a compiler may raise
            return f"torch.compile: {in_one_line(error)}"
        finally:
            self.spent += time.monotonic() - started
        return None


def _load_compiler() -> None:
    """Cut short in the middle of its import, the compiler would be broken for the rest of the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch says about its own parts
        importlib.import_module("torch._inductor.compile_fx")


def _compiling_alone(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU, no worker processes: those of a compilation that is cut short would run into the next contender's times."""
    if device.type != "cpu":
        return contextlib.nullcontext()
    from torch._inductor import config

    return config.patch(compile_threads=1)
