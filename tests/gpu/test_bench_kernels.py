"""`python -m bench kernels` on a GPU: linear layers run as Triton kernels at either capacity, movers also at larger batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.kernels import ops_linear
from bench.kernels.contenders import COMPILED, FORWARD, OURS, TIGHT
from bench.kernels.schema import KernelResult
from bench.schema import PASSED

pytestmark = pytest.mark.gpu
SIZES = [
    "--model",
    "tiny",
    "--size",
    "256",
    "--batch",
    "2",
    "--classes",
    "21",
    "--repeats",
    "2",
    "--compile-minutes",
    "0",
]


def rows_of(tmp_path: Path, *ops: str) -> KernelResult:
    """Everybody but the compiled contenders has passed the gate, before the clock, after it and on unseen numbers."""
    asked = [word for op in ops for word in ("--op", op)]
    status = main(["kernels", *SIZES, *asked, "--out", str(tmp_path)])
    result = KernelResult.read(tmp_path / "kernels.json")
    problems = {(row.op, row.contender): row.problem for row in result.rows if row.gate != PASSED}
    assert {name for _, name in problems} == {COMPILED}, problems
    assert status == 0
    return result


def test_linear_layers(tmp_path: Path) -> None:
    result = rows_of(tmp_path, ops_linear.BIAS, ops_linear.GELU, ops_linear.RESIDUAL)
    own = [row for row in result.rows if row.contender in (OURS, TIGHT)]
    assert [row.contender for row in own] == [OURS, TIGHT] * len(ops_linear.OPERATIONS)
    for row in own:
        assert row.floor == "triton" and row.teraflops_per_second > 0 and row.speedup > 0


def test_movers(tmp_path: Path) -> None:
    result = rows_of(tmp_path, "merge_tokens", "scatter_into")
    batches = [
        row.variant.rpartition(", batch ")[2]
        for row in result.rows
        if (row.contender, row.direction) == (OURS, FORWARD)
    ]
    assert batches == ["2", "8", "2", "48"]
