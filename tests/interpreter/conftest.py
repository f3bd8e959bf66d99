"""Kernels in Triton's interpreter, on the CPU. Needs TRITON_INTERPRET=1 before Triton is imported: see tests/test_suites.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sampling import sample

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    from interpreter import repairs, supervision

    import step_kernels as sk

    repairs.install()
    supervision.install()

    @pytest.fixture(autouse=True)
    def kernels() -> Iterator[list[str]]:
        """Ops run as kernels; the list of those launched. A test that launched none has proved nothing, so it fails."""
        supervision.launches.clear()
        supervision.shuffle_programs(None)
        with sk.use_backend("triton"):
            yield supervision.launches
        assert supervision.launches, "no kernel was launched"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETING:
        sample(config, items, Path(__file__).parent)
