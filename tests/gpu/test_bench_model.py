"""`python -m bench model` on a GPU: every contender runs and passes its gate, graphs never wait for the host, costs are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.kernels.schema import NOT_RUN
from bench.model.layouts import SPREAD
from bench.model.registry import BUCKETS, DENSE, EXITS_STATIC, FRONT, GROUPED, MERGED_STATIC, NAMES, PARTS
from bench.model.schema import ModelResult
from bench.schema import PASSED

pytestmark = pytest.mark.gpu
# Not there on every GPU that runs the kernels: grouped_mm wants Hopper, varlen_attn FlashAttention in this build of PyTorch.
MAY_BE_MISSING = {GROUPED, BUCKETS, PARTS}


@pytest.mark.filterwarnings("default")  # a warning of the compiler would count as a failure to compile
def test_every_contender(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--size", "256", "--batch", "3", "--classes", "21", "--repeats", "2"]
    status = main(["model", *arguments, "--compile-minutes", "2", "--profile", "--out", str(tmp_path)])
    result = ModelResult.read(tmp_path / "model.json")
    problems = {
        (row.contender, row.layout): (row.gate, row.problem, row.note) for row in result.rows if row.gate != PASSED
    }
    assert status == 0, problems
    assert {name for name, _ in problems} <= MAY_BE_MISSING, problems
    assert all(gate == NOT_RUN for gate, _, _ in problems.values())
    spread = {row.contender: row for row in result.rows if row.layout == SPREAD}
    assert list(spread) == list(NAMES)
    for name in (EXITS_STATIC, MERGED_STATIC, FRONT):
        assert spread[name].host_syncs == 0
        assert spread[name].compile_seconds > 0
    for row in spread.values():
        if row.gate == PASSED:
            assert row.peak_memory_bytes > 0 and row.median_ms > 0
            assert row.device_kernels is None or row.device_kernels > 0
    if spread[BUCKETS].gate == PASSED:
        assert spread[BUCKETS].host_syncs > 0 and spread[BUCKETS].compile_seconds > 0
        assert "CUDA graphs in buckets of sizes" in spread[BUCKETS].variant
    assert spread[DENSE].variant.startswith("compiled"), spread[DENSE].note
    assert not torch.cuda.is_current_stream_capturing()


@pytest.mark.filterwarnings("default")
def test_another_size_has_weights_and_graphs_of_its_own(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--size", "256", "192", "--batch", "3", "1", "--classes", "21", "--repeats", "2"]
    names = [word for name in (DENSE, EXITS_STATIC, MERGED_STATIC) for word in ("--contender", name)]
    more = ["--layout", SPREAD, "--compile-minutes", "0", "--out", str(tmp_path)]
    assert main(["model", *arguments, *names, *more]) == 0
    result = ModelResult.read(tmp_path / "model.json")
    cases = [(256, 3), (256, 1), (192, 3)]
    assert [(row.size, row.batch) for row in result.rows] == [case for case in cases for _ in range(3)]
    assert {row.gate for row in result.rows} == {PASSED}, [row.problem for row in result.rows]
    assert all(row.host_syncs == 0 for row in result.rows if row.contender != DENSE)
