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
    passed = re.search(r"(\d+) passed", output)
    may_skip = suite in STANDINS or suite in ORDINARY  # for want of a second GPU, a browser
    assert passed and int(passed[1]) > 0 and (may_skip or "skipped" not in output), output[-2000:]
