"""Waits of the host for the device, as PyTorch reports them: an error, a warning, nothing; inside a recording always an error."""

from __future__ import annotations

import warnings

from . import graphs

LEVELS = {"default": 0, "warn": 1, "error": 2}
PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"


class DebugMode:
    """PyTorch's setting, one for the process. Its first change warns, once, after the mode was changed."""

    level = 0
    warned = False

    @classmethod
    def set(cls, mode: int | str) -> None:
        cls.level = LEVELS[mode] if isinstance(mode, str) else mode
        if not cls.warned:
            cls.warned = True
            warnings.warn(PROTOTYPE, UserWarning, stacklevel=2)

    @classmethod
    def get(cls) -> int:
        return cls.level


def waits(what: str) -> None:
    """The host is about to wait for the device."""
    graphs.refuse_wait(what)
    if DebugMode.level == LEVELS["error"]:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
    if DebugMode.level == LEVELS["warn"]:
        warnings.warn(f"called a synchronizing CUDA operation ({what})", UserWarning, stacklevel=3)
