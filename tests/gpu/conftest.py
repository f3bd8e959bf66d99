"""The same claims on a real GPU: ``pytest -m gpu``. Skipped, with the reason, where there is none that runs Triton kernels."""

from collections.abc import Iterator

import pytest
import torch

import step_kernels as sk
from step_kernels.backend import why_no_triton_on


def why_not() -> str | None:
    """The reason why the kernels cannot run on this machine."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return why_no_triton_on(torch.device("cuda", torch.cuda.current_device()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if "gpu" in item.keywords and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    # Whole benchmarks last: where the suite cuts the tests short, each kernel has been looked at.
    items.sort(key=lambda item: "gpu" in item.keywords and item.path.name.startswith("test_bench"))


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    """Kernels or an error: nothing falls back."""
    with sk.use_backend("triton"):
        yield
