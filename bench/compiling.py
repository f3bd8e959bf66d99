"""torch.compile under a budget that all contenders of a run share."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .kernels.contenders import OutOfTime, in_one_line, time_limit

MOST_VARIANTS = 64


class CompileBudget:
    """Minutes for the first calls of compiled contenders.

    Without a compiled baseline no bar can be decided, so the other contenders leave what the baselines that are still to come will
    need: for each of them, as long as the slowest one so far has taken.

    Args:
        minutes: of all of them together; 0 compiles nothing.
        device: that they run on.

    Attributes:
        spent: seconds so far.
        baselines_to_come: how many baselines will still be compiled; whoever knows sets it, each one compiled takes one off.
    """

    def __init__(self, minutes: float, device: torch.device) -> None:
        self._minutes, self._device = minutes, device
        self._longest_baseline = 0.0
        self.spent = 0.0
        self.baselines_to_come = 0

    def spend(self, call: Callable[[], object], *, baseline: bool = False) -> str | None:
        """Makes the call for as long as the budget lasts; what went wrong, or None.

        Args:
            call: compiles.
            baseline: for a baseline, which may use up everything.
        """
        given = f"--compile-minutes {self._minutes:g}"
        left = self._minutes * 60 - self.spent
        if baseline:
            self.baselines_to_come = max(0, self.baselines_to_come - 1)
        elif left > 0 and (kept := self.baselines_to_come * self._longest_baseline) > 0:
            left -= kept
            given += ", less what the dense models to come will need,"
        if left <= 0:
            return f"not compiled: {given} is used up"
        started = time.monotonic()
        _load_compiler()
        left -= time.monotonic() - started
        try:
            with time_limit(left), _compiling_alone(self._device), _every_variant():
                call()
        except OutOfTime:
            return f"not compiled in what was left of {given.removesuffix(',')}{_end_of_workers()}"
        except Exception as error:  # whatever a compiler may raise
            return f"torch.compile: {in_one_line(error)}"
        finally:
            took = time.monotonic() - started
            self.spent += took
            if baseline:
                self._longest_baseline = max(self._longest_baseline, took)
        return None


def _end_of_workers() -> str:
    """Stops the compiler's workers; nothing, or what to add to a problem where that fails."""
    try:
        stop_workers()
    except Exception as error:  # the compiler's own parts, which other versions may name otherwise
        return f"; its worker processes could not be stopped, times after it may suffer: {in_one_line(error)}"
    return ""


def stop_workers() -> None:
    """Ends Inductor's worker processes: those of a compilation that was cut short would run into the next contender's times.

    A later compilation starts new ones. Kernels that the old ones still owe are forgotten, or it would wait for those.
    """
    from torch._inductor import async_compile, utils

    for pool in tuple(async_compile._pool_set):
        # torch 2.11 waits for the end of all jobs, queued ones too, so their processes have to be gone first.
        for worker in _children_of(pool.process.pid) if hasattr(pool, "process") else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGTERM)
    async_compile.shutdown_compile_workers()
    utils.clear_caches()


def _children_of(process: int) -> list[int]:
    """Ids of a process's children; none where the system does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _load_compiler() -> None:
    """Cut short in the middle of its import, the compiler would be broken for the rest of the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PyTorch says about its own parts
        importlib.import_module("torch._inductor.compile_fx")


def _every_variant() -> contextlib.AbstractContextManager[Any]:
    """A function may be compiled for many batch sizes and modes: above its limit, 8, PyTorch would run it eagerly with no more than a warning."""
    from torch._dynamo import config

    return config.patch(recompile_limit=MOST_VARIANTS, fail_on_recompile_limit_hit=True)


def _compiling_alone(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU, no worker processes: those of a compilation that is cut short would run into the next contender's times."""
    if device.type != "cpu":
        return contextlib.nullcontext()
    from torch._inductor import config

    return config.patch(compile_threads=1)
