"""The kernels of rotary positions compile for every architecture, fit it, and spill nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, check, compiled, meta

from step_kernels.triton import rope

CAPACITY, HEADS = 8 * 4101, 16
# ViT-L's heads in every dtype on sm_90, and in one elsewhere; SO400M's 72 channels, and the widest.
CASES = [(90, dtype, 64) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
CASES += [(90, torch.bfloat16, 72), (90, torch.float32, 256)]


def qkv(width, dtype):
    return meta(CAPACITY, 3, HEADS, width, dtype=dtype).unbind(1)


@pytest.mark.parametrize(
    ("architecture", "dtype", "width", "rotate_half"),
    [
        *((*case, rotate_half) for case in CASES for rotate_half in (True, False)),
        *((architecture, torch.bfloat16, 64, False) for architecture in BESIDE_90),
    ],
)
def test_rotation_forward_and_backward(architecture, dtype, width, rotate_half):
    q, k, _ = qkv(width, dtype)
    table, cu_seqlens = meta(CAPACITY, width), meta(9, dtype=torch.int32)
    with compiled(architecture) as launches:
        rope.ragged_rope(q, k, table, cu_seqlens, rotate_half, False)
        rope.ragged_rope_backward(q.contiguous(), k.contiguous(), table, cu_seqlens, rotate_half)
    check(launches, ["rope_kernel"] * 2)


@pytest.mark.parametrize("rotate_half", [True, False])
def test_channels_are_moved_16_bytes_at_a_time(rotate_half):
    q, k, _ = qkv(64, torch.bfloat16)
    with compiled(90) as launches:
        rope.ragged_rope(q, k, meta(CAPACITY, 64), None, rotate_half, False)
    (launch,) = launches
    assert launch.instructions(r"ld\.global\S*\.v4\.b32") and launch.instructions(r"st\.global\S*\.v4\.b32")


@pytest.mark.parametrize(
    ("architecture", "pairs"), [*((architecture, 32) for architecture in (90, *BESIDE_90)), (90, 36)]
)
def test_table(architecture, pairs):
    for phases in (None, meta(pairs)):
        with compiled(architecture) as launches:
            rope.rope_table(
                meta(9, dtype=torch.int32), meta(CAPACITY, 4, dtype=torch.int32), meta(pairs, 2), phases, True
            )
        check(launches, ["rope_table_kernel"])
