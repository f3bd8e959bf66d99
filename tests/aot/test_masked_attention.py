"""The kernels of masked_attention compile for every architecture, fit it, and spill nothing, but for the wide float32 heads named here."""

import pytest
import torch
from aot.ahead_of_time import ARCHITECTURES, Launch, compiled

from step_kernels.triton import masked_attention

BATCH, HEADS, LENGTH = 8, 16, 4096
FORWARD = ["kept_rows_kernel", "cross_attention_kernel"]
BACKWARD = ["grad_queries_kernel", "grad_keys_kernel"]


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(
    architecture: int, dim: int, dtype: torch.dtype, all_keys: bool = False, length: int = LENGTH
) -> list[Launch]:
    q, k, v = meta(BATCH, length, 3, HEADS, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    with compiled(architecture) as launches:
        rows, counts = masked_attention.kept_rows(meta(BATCH, length, dtype=torch.bool))
        out, lse = masked_attention.masked_attention(q, k, v, rows, counts, all_keys, None, True)
        masked_attention.masked_attention_backward(out, q, k, v, out, lse, rows, counts, all_keys, None)
    assert [launch.name for launch in launches] == FORWARD + BACKWARD
    return launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    for launch in launches_of(architecture, 64, torch.bfloat16):
        launch.check(spilled=64 if launch.name in BACKWARD else 0)


@pytest.mark.parametrize(("architecture", "dim"), [(86, 96), (86, 128), (86, 256), (90, 80), (90, 128), (90, 256)])
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


def test_all_keys_and_the_instructions_that_the_design_counts_on():
    for all_keys in (False, True):
        _, forward, *backward = launches_of(90, 64, torch.bfloat16, all_keys)
        for launch in (forward, *backward):
            launch.check()
            assert launch.instructions("wgmma.mma_async") and launch.instructions(r"cp.async")


def test_one_token():
    """Sizes of one are constants to the compiler."""
    for launch in launches_of(90, 64, torch.bfloat16, length=1):
        launch.check()
