"""Shared test settings."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import suites
import torch
from standin import plugin as standin

gc.disable()  # until the tests are collected: see pytest_collection_finish

try:
    from hypothesis import settings
except ImportError:  # tests/gpu need none
    pass
else:
    settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
    settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    standin.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    standin.configure(config)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return suites.left_to_a_suite(collection_path, config)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test draws the same numbers whatever ran before it."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the seeds of all devices would be kept for when they come, each with where it was called
        torch.default_generator.manual_seed(0)
    yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The suites run beside all other tests, so they are waited for last."""
    items.sort(key=lambda item: item.path.name == "test_suites.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """The collector need not walk what stays: hundreds of thousands of objects of the imports and of the tests."""
    gc.freeze()
    gc.enable()
    suites.start(session)


def pytest_sessionfinish(session: pytest.Session) -> None:
    suites.stop(session)
    gc.unfreeze()  # or Triton's bindings report leaks
