"""The same claims on a real GPU: ``pytest -m gpu``. Skipped, with the reason, where there is none that runs Triton kernels.

``--standin`` runs them without a GPU, for the host code round the kernels: see tests/standin.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sampling import sample

import step_kernels as sk
from step_kernels.backend import why_no_triton_on

# What has most parts in it first, whole benchmarks last: where the suite is cut short, the rest has been looked at.
ORDER = {"test_capture.py": -3, "test_model.py": -2, "test_attention.py": -1, "test_bench.py": 1}
HUGE = ("more_than", "two_million")  # tests that take a good part of the memory


def why_not() -> str | None:
    """The reason why the kernels cannot run on this machine."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return why_no_triton_on(torch.device("cuda", torch.cuda.current_device()))


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # the references of each would take all cores, and wait for one another
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    if config.option.no_summary:
        config.pluginmanager.register(TracebacksAtOnce())


class TracebacksAtOnce:
    """Where no summary is asked for, each failure is told as it comes: a run that is cut short, or crashes, gets to no summary."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\n{report.longreprtext}", flush=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sample(config, items, Path(__file__).parent)
    reason = why_not()
    for item in items:
        if "gpu" in item.keywords and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: ORDER.get(item.path.name, 0) if "gpu" in item.keywords else 0)


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    """Kernels or an error: nothing falls back."""
    with sk.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def shared_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where processes share the GPU (``-n 8`` of pytest-xdist): huge tests run one at a time, and none keeps memory for later.

    What breaks the device breaks it for its process: that ends, instead of failing all later tests. xdist starts another.
    """
    with open(__file__) as lock:
        if any(name in request.node.name for name in HUGE):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                if "PYTEST_XDIST_WORKER" in os.environ:
                    os._exit(1)
                pytest.exit(f"{request.node.nodeid} broke the device: {error}", returncode=1)
