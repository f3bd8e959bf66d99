"""These tests need the stand-in: tests/test_suites.py runs them in a process of their own, and so does ``pytest --standin tests/standin``."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("--standin") else True
