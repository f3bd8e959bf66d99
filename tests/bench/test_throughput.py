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
def case(policy: str) -> Case:
    options = Options(torch.device("cpu"), torch.float32, ("tiny",), (128,), (2,), policy=policy)
    return next(main.cases(options))


@pytest.mark.benchmark(max_time=0.1)
@pytest.mark.parametrize("policy", ["variance", "given"])
@pytest.mark.parametrize("name", [DENSE, MERGED, MERGED_EXITS])
def test_labels(benchmark: Callable[..., Any], policy: str, name: str) -> None:
    with torch.no_grad():
        row, contender = admit(case(policy), name, case(policy).contenders[name], Judge())
        assert contender is not None, row
        benchmark.extra_info["images per call"] = 2  # type: ignore[attr-defined]
        benchmark(contender.call, 0)
