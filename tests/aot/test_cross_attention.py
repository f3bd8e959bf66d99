"""The kernels of class_attention and masked_attention compile for every class of architectures, fit it, and spill nothing forwards.

Both ops launch the same three attention kernels, on a packed tensor or through a list of rows, with one table of tiles for the backward pass.
Each row of that table is compiled as class_attention has it: with the gradient of its scores it needs the most registers and shared memory.
"""

import pytest
import torch
import triton
from aot.ahead_of_time import CLASSES, Launch, compiled, meta

from step_kernels.triton import class_attention, masked_attention

BATCH, HEADS, LENGTH, TOKENS, QUERIES = 8, 16, 4096, 12800, 150
FORWARD = {
    "class": ["cross_attention_kernel", "class_scores_kernel"],
    "masked": ["kept_rows_kernel", "cross_attention_kernel"],
}
BACKWARD = ["grad_queries_kernel", "grad_keys_kernel"]


def of_classes(
    architecture: int, dim: int, dtype: torch.dtype, *, batch: int = BATCH, queries: int = QUERIES, scores: bool = True
) -> list[Launch]:
    q = meta(queries, HEADS, dim, dtype=dtype).expand(batch, -1, -1, -1)
    k, v = meta(TOKENS, 2, HEADS, dim, dtype=dtype).unbind(1)
    cu_seqlens = meta(batch + 1, dtype=torch.int32)
    with compiled(architecture) as launches:
        out, mean, lse = class_attention.class_attention(q, k, v, cu_seqlens, None, scores, True, False)
        grads = out, mean if scores else None
        class_attention.class_attention_backward(*grads, q, k, v, out, lse, cu_seqlens, None, False)
    assert [launch.name for launch in launches] == FORWARD["class"][: 1 + scores] + BACKWARD
    return launches


def of_masks(
    architecture: int,
    dim: int,
    dtype: torch.dtype,
    *,
    all_keys: bool = False,
    length: int = LENGTH,
    backward: bool = True,
) -> list[Launch]:
    q, k, v = meta(BATCH, length, 3, HEADS, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    with compiled(architecture) as launches:
        rows, counts = masked_attention.kept_rows(meta(BATCH, length, dtype=torch.bool))
        out, lse = masked_attention.masked_attention(q, k, v, rows, counts, all_keys, None, True)
        if backward:
            masked_attention.masked_attention_backward(out, q, k, v, out, lse, rows, counts, all_keys, None)
    assert [launch.name for launch in launches] == FORWARD["masked"] + (BACKWARD if backward else [])
    return launches


def check(launches: list[Launch], *, spilled: int = 0) -> None:
    for launch in launches:
        launch.check(spilled=64 if launch.name in BACKWARD else spilled)


@pytest.mark.parametrize("architecture", CLASSES)
def test_class_attention(architecture):
    check(of_classes(architecture, 64, torch.bfloat16))


@pytest.mark.parametrize("architecture", CLASSES)
def test_masked_attention(architecture):
    check(of_masks(architecture, 64, torch.bfloat16, backward=architecture == 90))


# The widest head of each row, and one that is loaded in two parts.
@pytest.mark.parametrize(("architecture", "dim"), [(86, 80), (86, 96), (86, 128), (86, 256), (90, 128), (90, 256)])
def test_other_heads(architecture, dim):
    check(of_classes(architecture, dim, torch.float16))
    if dim == 256:  # the same tiles through a list of rows
        masks = of_masks(architecture, dim, torch.float16, backward=False)
        check(masks, spilled=8 if architecture == 86 and triton.__version__.startswith("3.6.") else 0)


# Bytes: a thread of a float32 matmul holds whole rows of both operands, and 16 x 16 tiles are the smallest.
SPILLED = {"cross_attention_kernel": 512, "grad_queries_kernel": 3072, "grad_keys_kernel": 3072}


@pytest.mark.parametrize("dim", (64, 256))
def test_float32(dim):
    for launch in of_classes(90, dim, torch.float32):
        launch.check(spilled=SPILLED.get(launch.name, 0) if dim == 256 else 0)


@pytest.mark.parametrize("variant", (False, True))
def test_the_instructions_that_the_design_counts_on(variant):
    """Without scores and with them; without all keys and with them."""
    of_rows = of_masks(90, 64, torch.bfloat16, all_keys=variant, backward=variant)[1:]  # but for the list of rows
    for launch in [*of_classes(90, 64, torch.bfloat16, scores=variant), *of_rows]:
        launch.check()
        assert launch.instructions("wgmma.mma_async") and launch.instructions(r"cp.async")


def test_sizes_of_one():
    """Where they are strides, they are constants to the compiler."""
    for launch in [
        *of_classes(90, 64, torch.bfloat16, batch=1, queries=1),
        *of_masks(90, 64, torch.bfloat16, length=1),
    ]:
        launch.check()


@pytest.mark.parametrize(
    ("dim", "dtype", "scores"), [(16, torch.float16, False), (24, torch.bfloat16, True), (32, torch.float16, True)]
)
def test_one_class_of_narrow_heads(dim, dtype, scores):
    """As a constant of 1, the number of queries makes the ptxas of Triton 3.6.0 die on the backward pass."""
    check(of_classes(90, dim, dtype, queries=1, scores=scores))


@pytest.mark.parametrize("given", ((True, False), (False, True)))
def test_gradients_through_one_of_the_two(given):
    """The output of class_attention or its scores."""
    q, k = meta(BATCH, QUERIES, HEADS, 64, dtype=torch.bfloat16), meta(TOKENS, HEADS, 64, dtype=torch.bfloat16)
    scores, lse = meta(TOKENS, QUERIES, dtype=torch.bfloat16), meta(BATCH, HEADS, QUERIES)
    grads = [x if wanted else None for x, wanted in zip((q, scores), given, strict=True)]
    cu_seqlens = meta(BATCH + 1, dtype=torch.int32)
    with compiled(90) as launches:
        class_attention.class_attention_backward(*grads, q, k, k, q, lse, cu_seqlens, None, True)
    assert [launch.name for launch in launches] == BACKWARD
    for launch in launches:
        launch.check()
