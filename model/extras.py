"""Optional dependencies, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

__all__ = ["import_extra"]


def import_extra(module: str, package: str, extra: str) -> ModuleType:
    """The module; an ImportError that tells what to install where its package (pip's name) is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # installed, but something that it needs is missing
        what = f"{package} is needed for this and is not installed"
        raise ImportError(
            f"{what}: pip install {package}, or, in this project's checkout, pip install -e '.[{extra}]'"
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        what = f"{package} cannot be imported, as the installed torchvision was built for another PyTorch than {torch.__version__}"
        raise ImportError(f"{what} ({error}): {matching_torchvision(torch.__version__)}") from error


def matching_torchvision(version: str) -> str:
    """The command that installs the torchvision of this PyTorch. PyTorch's indices are called as its builds are: cpu, cu130."""
    build = version.partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip uninstall -y torchvision && pip install torchvision torch=={version}{index}"
