"""A quicker look at a suite. ``KERNEL_TEST_SAMPLE=32`` runs every thirty-second case of each file, as CI does on the oldest Triton; ``each``
runs one case of every test function, as CI does on the stand-in. Which ones, ``KERNEL_TEST_SHIFT`` moves: CI counts commits, so that one of
them after the other proves all."""

from __future__ import annotations

import itertools
import os
import zlib
from pathlib import Path

import pytest

SAMPLE = os.environ.get("KERNEL_TEST_SAMPLE", "1")
SHIFT = int(os.environ.get("KERNEL_TEST_SHIFT", "0"))


def sample(config: pytest.Config, items: list[pytest.Item], folder: Path) -> None:
    """Of the tests in a folder. The first that is kept differs among functions and files: cases alike in first place would leave
    whole architectures and dtypes out."""
    kept, dropped = [], []
    for name, group in itertools.groupby(items, key=_function if SAMPLE == "each" else _file):
        cases = list(group)
        every = len(cases) if SAMPLE == "each" else int(SAMPLE)
        first = (zlib.crc32(name.encode()) + SHIFT) % every
        for number, item in enumerate(cases):
            (dropped if (number - first) % every and folder in item.path.parents else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _file(item: pytest.Item) -> str:
    return item.path.name


def _function(item: pytest.Item) -> str:
    return f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
