"""torch.compile and torch.export of ops and models on the CPU: minutes, of which a plain ``pytest`` takes a sample (tests/suites.py)."""

from pathlib import Path

import pytest
from sampling import sample


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sample(config, items, Path(__file__).parent)
