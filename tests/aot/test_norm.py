"""LayerNorm's kernels compile for every architecture, fit it, and spill nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, check, compiled, meta

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
ON_HOPPER = [(90, torch.float32, 1024), (90, torch.float16, 384), (90, torch.bfloat16, 150), (90, torch.float32, 5000)]


@pytest.mark.parametrize(("architecture", "dtype", "width"), EVERYWHERE + ON_HOPPER)
def test_forward_and_backward(architecture, dtype, width, monkeypatch):
    monkeypatch.setattr("step_kernels.triton.common.launch.MULTIPROCESSORS", 132)
    x, weight = (meta(*size, dtype=dtype) for size in ((CAPACITY, width), (width,)))
    cu_seqlens = meta(9, dtype=torch.int32)
    with compiled(architecture) as launches:
        norm.ragged_layer_norm(x, weight, weight, 1e-6, cu_seqlens, True)
        norm.ragged_layer_norm_backward(x, x, weight, weight, 1e-6, cu_seqlens, [True] * 3)
    check(launches, NAMES)


def test_rows_are_loaded_16_bytes_at_a_time():
    x, weight = (meta(*size, dtype=torch.bfloat16) for size in ((CAPACITY, 1024), (1024,)))
    with compiled(90) as launches:
        norm.ragged_layer_norm(x, weight, weight, 1e-6, None, False)
    (launch,) = launches
    assert launch.instructions(r"ld\.global\S*\.v4\.b32") and launch.instructions(r"st\.global\S*\.v4\.b32")
