"""The main job's contenders at a small size under pytest-benchmark: `pytest tests/bench/test_throughput.py --benchmark-only`. `python -m bench` is what to quote."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import main
from bench.engine import Case, admit
from bench.gate import Judge
from bench.options import Options
from bench.segmenters import DENSE, MERGED, MERGED_EXITS

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark comes with the extra test")


@functools.cache
def case() -> Case:
    return next(main.cases(Options(torch.device("cpu"), torch.float32, ("tiny",), (128,), (2,))))


@pytest.mark.benchmark(max_time=0.1)
@pytest.mark.parametrize("name", [DENSE, MERGED, MERGED_EXITS])
def test_labels(benchmark: Callable[..., Any], name: str) -> None:
    with torch.no_grad():
        row, contender = admit(case(), name, case().contenders[name], Judge())
        assert contender is not None, row
        benchmark.extra_info["images per call"] = 2  # type: ignore[attr-defined]
        benchmark(contender.call, 0)
