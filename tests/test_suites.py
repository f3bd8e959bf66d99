"""The kernels without a GPU, and what else runs beside: see suites.py."""

import re

import pytest
from suites import ORDINARY, SESSION, STANDINS, SUITES

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def suites(request: pytest.FixtureRequest):
    return request.config.stash[SESSION]


@pytest.mark.parametrize("suite", SUITES)
def test_in_a_process_of_its_own(suite, suites):
    status, output = suites.wait(suite)
    assert status == 0, output[-10000:]
    passed, may_skip = (
        re.search(r"(\d+) passed", output),
        suite in STANDINS or suite in ORDINARY,
    )  # no second GPU, no browser
    assert passed and int(passed[1]) > 0 and (may_skip or "skipped" not in output), output[-2000:]
