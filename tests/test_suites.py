"""Two suites whose files run in processes of their own, as many at a time as there are cores, since each keeps one of them busy.

tests/interpreter needs TRITON_INTERPRET=1 before Triton is imported; tests/aot needs the compiler, which that would replace.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = [
    str(path.relative_to(TESTS))
    for suite in ("aot", "interpreter")
    for path in sorted(TESTS.glob(f"{suite}/test_*.py"))
]

pytest.importorskip("triton", reason="Triton is not installed")


def run(file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    if file.startswith("interpreter"):
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [*command, str(TESTS / file)], env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    selected = [item for item in request.session.items if item.originalname == "test_kernels_without_a_gpu"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {item.callspec.params["file"]: pool.submit(run, item.callspec.params["file"]) for item in selected}
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("file", FILES)
def test_kernels_without_a_gpu(file, runs):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 0 and "skipped" not in done.stdout, done.stdout[-2000:]
