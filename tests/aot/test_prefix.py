"""The kernel that swaps prefix tokens compiles for every architecture, fits it, and spills nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, check, compiled, meta

from step_kernels.triton import prefix

CAPACITY, BATCH, CLASSES = 8 * 4097, 8, 150
# Every dtype on sm_90, one elsewhere; a width of ViT-L, and one of no power of two.
CASES = [(architecture, torch.bfloat16, 1024) for architecture in (90, *BESIDE_90)]
CASES += [(90, torch.float16, 1024), (90, torch.float32, 1024), (90, torch.float32, 197)]
SHAPES = ((CLASSES,), (BATCH, CLASSES))  # of a prefix that images share, and of one for each


def offsets() -> torch.Tensor:
    return meta(BATCH + 1, dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("architecture", "dtype", "width", "fill_tail"),
    [*((*case, True) for case in CASES), (90, torch.bfloat16, 1024, False)],
)
def test_replace_prefix(architecture, dtype, width, fill_tail, shape):
    tokens, new_prefix = meta(CAPACITY, width, dtype=dtype), meta(*shape, width, dtype=dtype)
    with compiled(architecture) as launches:
        out, cu_seqlens, cells = prefix.replace_prefix(
            tokens, offsets(), meta(CAPACITY, 4, dtype=torch.int32), new_prefix, 1, fill_tail
        )
    assert out.shape == (CAPACITY + BATCH * (CLASSES - 1), width) and cells.shape == (len(out), 4)
    assert cu_seqlens.shape == (BATCH + 1,)
    check(launches, ["swap_prefix_kernel"])
    if width == 1024:
        assert launches[0].instructions(r"ld\.global[a-z0-9.:]*v4") > 0, "rows must be moved in 16-byte loads"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("architecture", "dtype", "width"), CASES)
def test_replace_prefix_backward(architecture, dtype, width, shape):
    grad = meta(CAPACITY + BATCH * (CLASSES - 1), width, dtype=dtype)
    with compiled(architecture) as launches:
        grads = prefix.replace_prefix_backward(grad, offsets(), CAPACITY, CLASSES, 1, len(shape) == 2)
    assert [tuple(g.shape) for g in grads] == [(CAPACITY, width), (*shape, width)]
    check(launches, ["swap_prefix_kernel", "sum_prefix_rows_kernel"])
