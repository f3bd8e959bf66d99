"""The kernels of class_attention compile for every architecture, fit it, and spill nothing, but for the wide float32 heads named here."""

import pytest
import torch
from aot.ahead_of_time import ARCHITECTURES, Launch, compiled

from step_kernels.triton import class_attention

BATCH, HEADS, TOKENS, CLASSES = 8, 16, 12800, 150
FORWARD = ["cross_attention_kernel", "class_scores_kernel"]
BACKWARD = ["grad_queries_kernel", "grad_keys_kernel"]


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(
    architecture: int,
    dim: int,
    dtype: torch.dtype,
    *,
    batch: int = BATCH,
    classes: int = CLASSES,
    with_scores: bool = True,
) -> list[Launch]:
    q = meta(classes, HEADS, dim, dtype=dtype).expand(batch, -1, -1, -1)
    k, v = meta(TOKENS, 2, HEADS, dim, dtype=dtype).unbind(1)
    cu_seqlens = meta(batch + 1, dtype=torch.int32)
    with compiled(architecture) as launches:
        out, scores, lse = class_attention.class_attention(q, k, v, cu_seqlens, None, with_scores, True, False)
        grad_scores = scores if with_scores else None
        class_attention.class_attention_backward(out, grad_scores, q, k, v, out, lse, cu_seqlens, None, False)
    assert [launch.name for launch in launches] == FORWARD[: 1 + with_scores] + BACKWARD
    return launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    for launch in launches_of(architecture, 64, torch.bfloat16):
        launch.check(spilled=64 if launch.name in BACKWARD else 0)


@pytest.mark.parametrize(("architecture", "dim"), [(86, 80), (86, 128), (86, 256), (90, 128), (90, 256)])
def test_other_heads(architecture, dim):
    for launch in launches_of(architecture, dim, torch.float16):
        launch.check(spilled=64 if launch.name in BACKWARD else 0)


SPILLING = {  # bytes: a thread of a float32 matmul holds whole rows of both operands, and 16 x 16 tiles are the smallest
    256: {"cross_attention_kernel": 512, "grad_queries_kernel": 3072, "grad_keys_kernel": 3072},
}


@pytest.mark.parametrize("dim", (64, 256))
def test_float32(dim):
    for launch in launches_of(90, dim, torch.float32):
        launch.check(spilled=SPILLING.get(dim, {}).get(launch.name, 0))


def test_the_instructions_that_the_design_counts_on():
    for with_scores in (False, True):
        for launch in launches_of(90, 64, torch.bfloat16, with_scores=with_scores):
            launch.check()
            assert launch.instructions("wgmma.mma_async") and launch.instructions(r"cp.async")


def test_one_image_and_one_class():
    """Sizes of one are constants to the compiler."""
    for launch in launches_of(90, 64, torch.bfloat16, batch=1, classes=1):
        launch.check()


@pytest.mark.parametrize("given", ((True, False), (False, True)))
def test_gradients_through_one_of_the_two(given):
    q, k = meta(BATCH, CLASSES, HEADS, 64, dtype=torch.bfloat16), meta(TOKENS, HEADS, 64, dtype=torch.bfloat16)
    scores, lse = meta(TOKENS, CLASSES, dtype=torch.bfloat16), meta(BATCH, HEADS, CLASSES, dtype=torch.float32)
    grads = [x if wanted else None for x, wanted in zip((q, scores), given, strict=True)]
    with compiled(90) as launches:
        class_attention.class_attention_backward(
            *grads, q, k, k, q, lse, meta(BATCH + 1, dtype=torch.int32), None, True
        )
    assert [launch.name for launch in launches] == BACKWARD
    for launch in launches:
        launch.check()
