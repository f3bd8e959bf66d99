"""LayerNorm's kernels compile for every architecture, fit it, and spill nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, check, compiled, meta
from aot.sass import access_bytes, programs_per_multiprocessor

from step_kernels.triton.common import tuned
from step_kernels.triton.norm import launch as norm

CAPACITY = 32776
NAMES = [
    "layer_norm_kernel",
    "layer_norm_backward_kernel",
    "layer_norm_parameters_kernel",
    "sum_chunks_kernel",
]
EVERYWHERE = [(architecture, torch.bfloat16, 1024) for architecture in (90, *BESIDE_90)]
# ViT-S and ViT-L's widths, the 150 classes of a decoder's scores, rows that no block of columns holds
OTHERS = [(90, torch.float32, 1024), (100, torch.bfloat16, 384), (90, torch.float16, 150), (90, torch.float32, 5000)]


@pytest.mark.parametrize(("architecture", "dtype", "width"), EVERYWHERE + OTHERS)
def test_forward_and_backward(architecture, dtype, width, monkeypatch):
    """Programs of the persistent kernels all run at once."""
    multiprocessors = 8
    monkeypatch.setattr("step_kernels.triton.common.launch.MULTIPROCESSORS", multiprocessors)
    x, weight = (meta(*size, dtype=dtype) for size in ((CAPACITY, width), (width,)))
    cu_seqlens = meta(9, dtype=torch.int32)
    with compiled(architecture) as launches:
        norm.ragged_layer_norm(x, weight, weight, 1e-6, cu_seqlens, True)
        norm.ragged_layer_norm_backward(x, x, weight, weight, 1e-6, cu_seqlens, [True] * 3)
    check(launches, NAMES)
    for launch in launches[:2]:
        assert launch.grid[0] <= multiprocessors * programs_per_multiprocessor(launch), launch.name
    if dtype == torch.bfloat16 and width == 1024:
        accesses = access_bytes(launches[0])
        assert not accesses["store"].keys() - {16} and not accesses["load"].keys() - {16, 4}, "4: cu_seqlens"
        assert accesses["load"][4] <= 2


@pytest.mark.parametrize(("architecture", "width"), ((90, 1024), (100, 1024), (120, 384)))
def test_candidates_run_all_at_once(architecture, width, monkeypatch):
    monkeypatch.setattr("step_kernels.triton.common.launch.MULTIPROCESSORS", 8)
    x, weight = (meta(*size, dtype=torch.bfloat16) for size in ((CAPACITY, width), (width,)))
    *_, row = norm.forward_candidates(x)
    with tuned.forced(" ".join(map(str, norm.row_key(x))), row), compiled(architecture) as launches:
        norm.ragged_layer_norm(x, weight, weight, 1e-6, meta(9, dtype=torch.int32), False)
    check(launches, NAMES[:1])
    assert launches[0].grid[0] == 8 * row[1] <= 8 * programs_per_multiprocessor(launches[0])
