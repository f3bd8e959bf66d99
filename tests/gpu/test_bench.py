"""bench's cases on a GPU at a small size: whoever can run is right, before the clock and after it; graphs are recorded and replayed."""

from __future__ import annotations

import pytest
import torch

from bench import kernels, model, peers
from bench.clock import device_clock, wall_clock
from bench.engine import compete
from bench.options import Options
from bench.result import PASSED, Row

pytestmark = pytest.mark.gpu

# What PyTorch's own parts, or a rival, may lack on this GPU or in this version.
MAY_BE_MISSING = ("needs ", "torch ")


def options(dtype: torch.dtype, size: int = 64, batch: int = 2) -> Options:
    return Options(torch.device("cuda"), dtype, ("tiny",), (size,), (batch,))


def check(rows: list[Row]) -> None:
    for row in rows:
        missing = row.problem is not None and row.problem.startswith(MAY_BE_MISSING)
        assert row.gate == PASSED or (missing and not row.ours), (
            f"{row.case}, {row.contender}: {row.gate}, {row.problem}"
        )
        assert missing or (row.median_ms and row.facts["host us"] > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(dtype: torch.dtype) -> None:
    asked = options(dtype, 256, 4)  # on a few rows, plain PyTorch's error is a matter of luck
    clock = device_clock(asked.device, 2**20)
    for case in kernels.cases(asked):
        check(compete(case, clock, rounds=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_models(dtype: torch.dtype) -> None:
    asked, notes = options(dtype), {}
    for case in model.cases(asked):
        rows = compete(case, wall_clock(asked.device), rounds=2)
        check(rows)
        notes |= {row.contender: row for row in rows}
    for name in ("merged, static", "merged + exits, static", "merged + exits, exact-size graph", "dense, our kernels"):
        assert "CUDA graph" in notes[name].note and notes[name].syncs == 0 and notes[name].peak_bytes


def test_peers() -> None:
    asked = options(torch.bfloat16)
    for case in peers.cases(asked):
        check(compete(case, wall_clock(asked.device), rounds=2))
