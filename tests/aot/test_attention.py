"""The attention kernels compile for every architecture, fit it, keep their promises about spills, and use what the hardware has."""

import contextlib
import re

import pytest
import torch
from aot.ahead_of_time import ARCHITECTURES, Launch, check, compiled, meta
from aot.sass import access_bytes, exposed_waits, instructions, programs_per_multiprocessor

from step_kernels.triton.attention import configs
from step_kernels.triton.attention import launch as attention
from step_kernels.triton.common import tuned
from step_kernels.triton.common.operands import split_head_dim

FORWARD = ["attention_forward_kernel"]
BACKWARD = ["attention_delta_kernel", "attention_grad_kv_kernel", "attention_grad_q_kernel"]
ROWS, HEADS, IMAGES = 16384, 16, 8
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def launched(
    architecture: int,
    dtype: torch.dtype,
    head_dim: int,
    *,
    backward: bool = False,
    biased: bool = True,
    scheduled: bool = False,
    padding: int = 0,
) -> list[Launch]:
    """What a call on views of one qkv compiles to; with ``padding`` heads start at odd addresses."""
    q, k, v = meta(ROWS, 3, HEADS, head_dim + padding, dtype=dtype)[..., :head_dim].unbind(1)
    out = meta(ROWS, HEADS, head_dim, dtype=dtype)
    cu_seqlens = meta(IMAGES + 1, dtype=torch.int32)
    bias = meta(ROWS) if biased else None
    schedule = meta(ROWS // 128 + IMAGES, 4, dtype=torch.int32) if scheduled else None
    metadata = (None, bias, schedule)
    with compiled(architecture) as launches:
        if backward:
            lse = meta(HEADS, ROWS)
            attention.ragged_attention_backward(torch.empty_like(out), q, k, v, out, lse, cu_seqlens, *metadata)
        else:
            attention.ragged_attention(q, k, v, cu_seqlens, *metadata, biased, True)
    assert [launch.name for launch in launches] == (BACKWARD if backward else FORWARD)
    return launches


# Hopper's wider heads: below. 120: the head whose tiles its compiler back end decided.
HEADS_OF = {80: (64, 80, 128), 86: (64,), 90: (64,), 100: (64, 80, 128), 120: (128,)}


@pytest.mark.parametrize(
    ("architecture", "head_dim"), [(number, dim) for number in HEADS_OF for dim in HEADS_OF[number]]
)
def test_forward_spills_nothing(architecture, head_dim):
    (launch,) = launched(architecture, BFLOAT, head_dim)
    launch.check()
    if architecture < 90:
        assert launch.instructions(r"cp\.async\.cg") > 0
    if architecture in (90, 100):
        assert launch.instructions(r"cp\.async\.bulk\.tensor") > 0
    if architecture == 100:
        assert launch.instructions(r"tcgen05\.mma") > 0


@pytest.mark.parametrize(("architecture", "programs"), ((80, 3), (89, 3), (90, 3), (100, 3)))
def test_lower_tiles_for_few_programs(architecture, programs, monkeypatch):
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 10**6)
    (launch,) = launched(architecture, BFLOAT, 64, biased=False)
    launch.check()
    assert launch.grid == ((ROWS // 64 + 2 * IMAGES) * HEADS,) and programs_per_multiprocessor(launch) >= programs


@pytest.mark.parametrize("architecture", [architecture for architecture in ARCHITECTURES if architecture != 90])
def test_backward_fits_every_architecture(architecture):
    check(launched(architecture, BFLOAT, 64, backward=True), BACKWARD, spilled=64)


@pytest.mark.parametrize(("architecture", "programs"), ((89, (2, 2)), (90, (2, 4)), (100, (1, 2))))
def test_candidates_of_the_backward_kernels_spill_nothing(architecture, programs):
    with contextlib.ExitStack() as stack:
        for kernel in ("attention_grad_kv", "attention_grad_q"):
            *_, row = configs.backward_candidates(kernel, architecture, BFLOAT, 64)
            stack.enter_context(tuned.forced(f"{kernel} half 64", row))
        launches = launched(architecture, BFLOAT, 64, backward=True, biased=False)
    check(launches, BACKWARD)
    assert tuple(map(programs_per_multiprocessor, launches[1:])) == programs


def test_blocks_of_fp32_are_summed_by_themselves():
    """No product goes on with the sums of the blocks before: as one chain with them it would err more than PyTorch's."""
    for launch in (*launched(90, FLOAT, 64), *launched(90, FLOAT, 64, backward=True)[1:]):
        begun_with = re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", launch.kernel.asm["ttgir"])
        assert begun_with and all(name.startswith("%cst") for name in begun_with)


# (backward, head_dim, dtype): bytes spilled on sm_90 beyond what is allowed elsewhere; why: triton/attention/configs.py.
EXCEPTIONS = {(True, 256, BFLOAT): 112, (True, 128, FLOAT): 256}


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    (
        (BFLOAT, 64),
        (HALF, 72),
        (BFLOAT, 96),
        (BFLOAT, 128),
        (BFLOAT, 192),
        (BFLOAT, 256),
        (FLOAT, 64),
        (FLOAT, 128),
    ),
)
def test_every_row_on_hopper(dtype, head_dim, backward):
    launches = launched(90, dtype, head_dim, backward=backward, biased=False, scheduled=True)
    spilled = EXCEPTIONS.get((backward, head_dim, dtype), 64 if backward else 0)
    check(launches, BACKWARD if backward else FORWARD, spilled=spilled)
    for launch in launches[1:] if backward else launches:
        assert launch.instructions(r"cp\.async\.bulk\.tensor") > 0
        assert dtype == FLOAT or launch.instructions("wgmma.mma_async") > 0
    if dtype != FLOAT and not backward:
        overlaps(launches[0], head_dim)


def overlaps(launch: Launch, head_dim: int) -> None:
    """Queries come 16 bytes at a time; only an image shorter than a step waits for its keys, then its values; matmuls run on together."""
    assert set(access_bytes(launch)["load"]) <= {4, 16}
    assert len(exposed_waits(launch)) == 2 * sum(part > 0 for part in split_head_dim(head_dim))
    names = [name for name, _ in instructions(launch)]
    assert 2 * sum(name.startswith("WARPGROUP.DEPBAR") for name in names) < sum(
        name.startswith("HGMMA") for name in names
    )
    assert programs_per_multiprocessor(launch) >= (2 if head_dim in (64, 256) else 1)


def test_heads_of_72_load_16_bytes_at_a_time():
    """144 bytes from head to head are no multiple of the 16 elements that Triton looks for by itself. On Hopper: above."""
    (launch,) = launched(80, BFLOAT, 72, biased=False)
    launch.check()
    assert launch.instructions(r"cp\.async\.cg") > 0


def test_unaligned_heads_go_through_pointers():
    (launch,) = launched(90, BFLOAT, 64, padding=1)
    assert launch.instructions(r"cp\.async\.bulk\.tensor") == 0 and launch.instructions("wgmma.mma_async") > 0


@pytest.mark.parametrize("architecture", (80, 90))
def test_schedule(architecture):
    with compiled(architecture) as launches:
        attention.attention_schedule(meta(257, dtype=torch.int32), 10**6)
    check(launches, ["attention_schedule_kernel"])


def test_every_row_has_been_named():
    """The head dimensions above reach each row of Hopper's tables."""
    for table in (configs.FORWARD, configs.GRAD_KV, configs.GRAD_Q):
        reached = {configs.tiles(table, 90, BFLOAT, sum(split_head_dim(dim))) for dim in (64, 80, 96, 128, 192, 256)}
        assert reached == {row for _, row in table["hopper", "half"]}
        assert all(rows[-1][0] == 256 and [*rows] == sorted(rows) for rows in table.values())
    for table in (configs.FORWARD, configs.GRAD_KV, configs.GRAD_Q, configs.FORWARD_FEW, configs.FORWARD_CANDIDATES):
        for rows in table.values():
            for _, row in rows:
                assert attention.TILE_ROWS % row.own == 0 and row.own >= 16 and row.step >= 16
