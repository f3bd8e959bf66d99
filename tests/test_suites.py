"""The interpreter's tests need TRITON_INTERPRET=1 before Triton is imported, so each file runs in a process of its own; as many at a
time as there are cores, since each keeps one of them busy."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "interpreter"
FILES = sorted(path.name for path in SUITE.glob("test_*.py"))

pytest.importorskip("triton", reason="Triton is not installed")


def run(file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(SUITE / file)],
        env=environment,
        cwd=SUITE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    selected = [item for item in request.session.items if item.originalname == "test_kernels_in_the_interpreter"]
    files = [item.callspec.params["file"] for item in selected]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in files}
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(file, runs):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 0 and "skipped" not in done.stdout, done.stdout[-2000:]
