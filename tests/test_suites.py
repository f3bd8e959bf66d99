"""The kernels without a GPU: see suites.py."""

import re

import pytest
from suites import SESSION, STANDINS, SUITES

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def suites(request: pytest.FixtureRequest):
    return request.config.stash[SESSION]


@pytest.mark.parametrize("suite", SUITES)
def test_kernels_without_a_gpu(suite, suites):
    status, output = suites.wait(suite)
    assert status == 0, output[-10000:]
    passed, skipped = re.search(r"(\d+) passed", output), "skipped" in output and suite not in STANDINS  # no second GPU
    assert passed and int(passed[1]) > 0 and not skipped, output[-2000:]
