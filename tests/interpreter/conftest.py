"""Kernels in Triton's interpreter, on the CPU. Needs TRITON_INTERPRET=1 before Triton is imported: see tests/test_suites.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sampling import sample

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    from interpreter import repairs, speed, supervision

    import step_kernels as sk
    from step_kernels.triton import class_attention
    from step_kernels.triton.attention import configs
    from step_kernels.triton.common import launch
    from step_kernels.triton.cross_attention import launch as cross_attention

    repairs.install()
    speed.install()
    supervision.install()

    @pytest.fixture(autouse=True)
    def kernels() -> Iterator[list[str]]:
        """Ops run as kernels; the list of those launched. A test that launched none has proved nothing, so it fails."""
        supervision.launches.clear()
        supervision.shuffle_programs(None)
        with sk.use_backend("triton"):
            yield supervision.launches
        assert supervision.launches, "no kernel was launched"

    # Of ragged_attention's two files; the others have their own.
    ROUTES = {"pointers": 80, "descriptors": 90}

    @pytest.fixture(params=ROUTES)
    def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr(launch, "INTERPRETED_ARCHITECTURE", ROUTES[request.param])
        return request.param

    @pytest.fixture
    def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
        """Set the rows of a program's tile and of a step: small, so that loops take several steps."""

        def force(own: int, step: int) -> None:
            monkeypatch.setattr(configs, "tiles", lambda *_: configs.Tiles(own, step, 4, 2))

        force(128, 32)
        return force

    @pytest.fixture
    def cross_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
        """The same for class_attention and masked_attention."""

        def force(own: int, step: int) -> None:
            rows = ((256, configs.Tiles(own, step, 4, 2)),)
            monkeypatch.setattr(cross_attention, "FLOAT", rows)
            for name in ("FORWARD", "FORWARD_FEW", "GRAD_QUERIES", "GRAD_KEYS"):
                monkeypatch.setattr(cross_attention, name, {"shared": rows})
            monkeypatch.setattr(class_attention, "TOKENS", own)
            monkeypatch.setattr(class_attention, "CLASSES", step)
            monkeypatch.setattr(class_attention, "STEP", {"half": 16, "float": 16})

        force(32, 16)
        return force


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETING:
        sample(config, items, Path(__file__).parent)
