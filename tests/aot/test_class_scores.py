"""The kernels of class_scores compile for every architecture and fit it; the forward one spills nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, Launch, compiled, meta

from step_kernels.triton import class_attention

BATCH, TOKENS, CLASSES = 8, 12800, 150
KERNELS = ["class_scores_kernel", "grad_class_vectors_kernel", "class_scores_kernel"]


def launches_of(
    architecture: int, dim: int, dtype: torch.dtype, *, batch: int = BATCH, classes: int = CLASSES
) -> list[Launch]:
    q, k = meta(batch, classes, dim, dtype=dtype), meta(TOKENS, dim, dtype=dtype)
    cu_seqlens = meta(batch + 1, dtype=torch.int32)
    with compiled(architecture) as launches:
        scores = class_attention.class_scores(q, k, cu_seqlens, 1.0, False)
        class_attention.class_scores_backward(scores, q, k, cu_seqlens, 1.0, False, [True, True])
    assert [launch.name for launch in launches] == KERNELS
    return launches


def check(launches: list[Launch]) -> None:
    launches[0].check()
    for launch in launches[1:]:  # the backward pass
        launch.check(spilled=64)


@pytest.mark.parametrize("architecture", (90, *BESIDE_90))
def test_every_architecture(architecture):
    check(launches_of(architecture, 1024, torch.bfloat16))


@pytest.mark.parametrize(("dim", "dtype"), [(192, torch.float32), (384, torch.float16), (17, torch.bfloat16)])
def test_other_widths_and_dtypes(dim, dtype):
    check(launches_of(90, dim, dtype))


def test_the_instructions_that_the_design_counts_on():
    """Both operands by cp.async, but for gradients [T, 150], whose rows start at no multiple of 16 bytes."""
    for classes in (160, 150):
        for launch in launches_of(90, 1024, torch.bfloat16, classes=classes):
            assert launch.instructions("wgmma.mma_async") and launch.instructions(r"cp\.async\.c[ag]")
            if classes == 160:
                assert launch.instructions(r"ld\.global") <= 4, f"{launch.name}: more than cu_seqlens"


def test_one_image_and_one_class():
    """One class is a constant to the compiler: rows of the scores are one number."""
    check(launches_of(90, 64, torch.bfloat16, batch=1, classes=1))
