"""Optional dependencies, imported where they are needed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

import torch

Item = TypeVar("Item")


def how_to_install(packages: str, extra: str) -> str:
    """The commands: this package is in no index, so its extras are those of a checkout."""
    return f"pip install {packages}, or, in a checkout, pip install -e '.[{extra}]'"


def import_extra(module: str, package: str, extra: str) -> ModuleType:
    """The module; an ImportError that tells what to install where its package (pip's name) is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # installed, but something that it needs is missing
        what = f"{package} is needed for this and is not installed"
        raise ImportError(f"{what}: {how_to_install(package, extra)}") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        build = torch.__version__.partition("+")[2]  # PyTorch's indices are called as its builds are: cpu, cu130
        index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
        mend = f"pip uninstall -y torchvision && pip install torchvision torch=={torch.__version__}{index}"
        what = f"{package} cannot be imported, as torchvision was built for another PyTorch than {torch.__version__}"
        raise ImportError(f"{what} ({error}): {mend}") from error


def shown(items: Iterable[Item], what: str, **named: object) -> Iterable[Item]:
    """The items behind a bar of tqdm (``named``: its settings), where that is installed, on a terminal."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(items, what, **{"leave": False, "disable": None} | named)
    return items
