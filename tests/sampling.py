"""A quicker look at a suite: ``KERNEL_TEST_SAMPLE=3`` runs a third of each test's cases, at least one. CI does so on the oldest Triton."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

EVERY = int(os.environ.get("KERNEL_TEST_SAMPLE", "1"))


def sample(config: pytest.Config, items: list[pytest.Item], folder: Path) -> None:
    """Of the tests in a folder, keep the 1st, (EVERY + 1)th, ... case of each function."""
    kept, dropped = [], []
    for _, cases in itertools.groupby(items, key=lambda item: (item.path, getattr(item, "originalname", item.name))):
        for number, item in enumerate(cases):
            (dropped if number % EVERY and folder in item.path.parents else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
