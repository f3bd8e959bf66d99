"""A quicker look at a suite: ``KERNEL_TEST_SAMPLE=16`` runs a sixteenth of each test's cases, at least one. CI does so on the oldest Triton."""

from __future__ import annotations

import itertools
import os
import zlib
from pathlib import Path

import pytest

EVERY = int(os.environ.get("KERNEL_TEST_SAMPLE", "1"))


def sample(config: pytest.Config, items: list[pytest.Item], folder: Path) -> None:
    """Of the tests in a folder, keep each function's every EVERY-th case, from one on that differs among functions: all cases
    alike in first place would leave whole architectures and dtypes out."""
    kept, dropped = [], []
    for (_, name), group in itertools.groupby(
        items, key=lambda item: (item.path, getattr(item, "originalname", item.name))
    ):
        cases = list(group)
        first = zlib.crc32(name.encode()) % min(EVERY, len(cases))
        for number, item in enumerate(cases):
            (dropped if (number - first) % EVERY and folder in item.path.parents else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
