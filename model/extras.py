"""Optional dependencies, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["import_extra"]


def import_extra(module: str, package: str, extra: str) -> ModuleType:
    """The module; an ImportError that tells what to install where its package (pip's name) is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # installed, but something that it needs is missing
        what = f"{package} is needed for this and is not installed"
        raise ImportError(f"{what}: pip install {package}, or pip install 'step-kernels[{extra}]'") from error
