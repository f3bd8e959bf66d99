"""Kernels compiled ahead of time. Needs a Triton that compiles: not one that was imported under TRITON_INTERPRET=1.

A plain ``pytest`` leaves these files to tests/test_suites.py, which runs them side by side; ``pytest tests/aot`` runs them here.
"""

import importlib.util
import os
from pathlib import Path

import pytest
from sampling import sample

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return True
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path == HERE or HERE in path.parents for path in named) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sample(config, items, HERE)
