"""`python -m bench peers` on a GPU: every peer runs, passes its gate, and waits for the host where ours does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.kernels.schema import NOT_RUN
from bench.model.layouts import SPREAD
from bench.model.registry import EXITS_STATIC, MERGED_STATIC
from bench.model.schema import ModelResult
from bench.peers.registry import CTS_DTOP, DTOP, NAMES, OURS_EXITS_STATIC, STEP_SDPA, TOME
from bench.schema import PASSED

pytestmark = pytest.mark.gpu


def test_every_peer(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--size", "256", "--batch", "3", "--classes", "21", "--repeats", "2"]
    status = main(["peers", *arguments, "--compile-minutes", "1", "--out", str(tmp_path)])
    rows = {(row.layout, row.contender): row for row in ModelResult.read(tmp_path / "peers.json").rows}
    assert status == 0
    assert {name for _, name in rows} == set(NAMES)
    for (kind, name), row in rows.items():
        if name == TOME and row.gate == NOT_RUN:  # its package is the user's business
            assert "ToMe's own package" in row.problem
            continue
        assert row.gate == (NOT_RUN if kind == SPREAD and name.startswith("CTS") else PASSED), row
        if name in (EXITS_STATIC, MERGED_STATIC, OURS_EXITS_STATIC):
            assert row.host_syncs == 0
        if name in (DTOP, CTS_DTOP, STEP_SDPA) and row.gate == PASSED:
            assert row.host_syncs > 3
