"""The main job's cases under pytest-benchmark: `pytest bench/ --benchmark-only`.

Small sizes and drawn pictures: what counts here is that every contender passes its gate and that one command times them
all; `python -m bench` is the comparison to quote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench import gate
from bench.case import Case, build_case
from bench.images import Photographs
from bench.providers import REGISTRY
from bench.settings import Settings

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark comes with the extra test")

CASES = {
    "variance": Settings(model="tiny", size=128, batch=2),
    "given": Settings(model="tiny", size=128, batch=2, policy="given"),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: f"policy {name}")
def case(request: pytest.FixtureRequest) -> Case:
    settings = CASES[request.param]
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    pixels = coarse.repeat(settings.size // 4, axis=1).repeat(settings.size // 4, axis=2)
    pixels[:, : settings.size // 2] ^= generator.integers(0, 64, pixels[:, : settings.size // 2].shape, dtype=np.uint8)
    return build_case(settings, Photographs(("first", "second"), pixels, ()))


@pytest.mark.parametrize("provider", ["dense", "merged", "merged + exits"])
def test_labels(benchmark: Callable[..., Any], case: Case, provider: str) -> None:
    contender = REGISTRY[provider](case)
    assert contender is not None
    verdict = gate.check(contender, case.inputs)
    assert verdict.passed, verdict
    benchmark.extra_info["images per call"] = case.settings.batch  # type: ignore[attr-defined]
    benchmark(contender.labels, case.inputs[0], contender.traces[0])
