"""An op on the PyTorch reference, whatever runs around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import step_kernels as sk


def reference(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What ``function`` returns where every op of it runs its reference."""
    with sk.use_backend("reference"):
        return function(*arguments, **named)
