"""The same claims on a real GPU: ``pytest -m gpu``. Skipped, with the reason, where there is none that runs Triton kernels."""

import pytest
import torch

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
