"""The layout kernels compile for every architecture, fit it, and spill nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, check, compiled, meta

from step_kernels.triton import layout

SIDES = [2, 4, 8, 16]
NAMES = ["count_kernel", "scan_kernel", "write_kernel"]
# Every dtype on sm_90, one elsewhere.
CASES = [(architecture, torch.float32) for architecture in (90, *BESIDE_90)] + [
    (90, torch.float16),
    (90, torch.bfloat16),
]


def scores(dtype: torch.dtype) -> list[torch.Tensor]:
    return [meta(8, 64 // side, 64 // side, dtype=dtype) for side in SIDES]


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_resolve_layout(architecture, dtype):
    with compiled(architecture) as launches:
        layout.resolve_layout(scores(dtype), SIDES, [0.5] * 4, [], 64, 64, 1)
        thresholds = [meta()] * 4
        layout.resolve_layout(scores(dtype), SIDES, [], thresholds, 64, 64, 1)
    check(launches, 2 * NAMES)


@pytest.mark.parametrize("architecture", (90, *BESIDE_90))
def test_from_sides(architecture, monkeypatch):
    monkeypatch.setattr(layout, "validate_sides", lambda sides: None)  # meta tensors have no values to check
    with compiled(architecture) as launches:
        layout.layout_from_sides(meta(8, 64, 64, dtype=torch.int32), 1)
    check(launches, NAMES)
