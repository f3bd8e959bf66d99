"""The exit kernels compile for every architecture, fit it, and spill nothing; the linear exit's matmul runs on tensor cores."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, CLASSES, candidates_of, check, compiled, meta
from aot.sass import access_bytes, programs_per_multiprocessor, warps_per_multiprocessor
from tensors import matmuls_in

from step_kernels.triton.halting import compaction, decision, gather, head
from step_kernels.triton.halting import launch as halting

BATCH, GRID = 8, 64
CAPACITY = BATCH * (GRID * GRID + 1)
EVERYWHERE = [(architecture, torch.bfloat16) for architecture in (90, *BESIDE_90)]
CASES = [*EVERYWHERE, (90, torch.float16), (90, torch.float32)]
# ViT-L on ADE20K everywhere; ViT-S on Cityscapes on the largest and the smallest chip
HEADS = [*((*case, 1024, 150) for case in CASES), (90, torch.bfloat16, 384, 19), (86, torch.bfloat16, 384, 19)]
# COCO-Stuff, more than stay in registers, and the most of an even number that do
HEADS += [(90, torch.bfloat16, 1024, 171), (90, torch.bfloat16, 1024, 847), (100, torch.bfloat16, 1024, 182)]


def integers(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def layout() -> tuple[torch.Tensor, torch.Tensor]:
    return integers(BATCH + 1), integers(CAPACITY, 4)


def canvas(classes: int, dtype: torch.dtype, channels_last: bool = True) -> torch.Tensor:
    if channels_last:
        return meta(BATCH, GRID, GRID, classes, dtype=dtype).permute(0, 3, 1, 2)
    return meta(BATCH, classes, GRID, GRID, dtype=dtype)


def run_head(dim: int, classes: int, dtype: torch.dtype, keep: int = 0, painted: bool = True) -> None:
    shapes = [(CAPACITY, dim), (dim,), (dim,), (classes, dim), (classes,)]
    inputs = [meta(*shape, dtype=dtype) for shape in shapes]
    into = canvas(classes, dtype) if painted else None
    halting.exit_head(*inputs, 1e-6, *layout(), 0.95, None, keep, None, into)


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_halt_tokens(architecture, dtype):
    scores = meta(CAPACITY, 150, dtype=dtype)
    with compiled(architecture) as launches:
        halting.halt_tokens(scores, *layout(), 0.95, None, True, 5, None, scores, canvas(150, dtype))
    check(launches, ["decide_kernel", "keep_kernel", "compact_kernel"])
    assert programs_per_multiprocessor(launches[0]) >= 8
    assert 2 not in access_bytes(launches[0])["load"], "pairs of scores"
    assert programs_per_multiprocessor(launches[1]) >= 3  # 4 by Triton 3.9


def test_halt_tokens_with_every_option():
    scores, mask = meta(CAPACITY, 19, dtype=torch.bfloat16), meta(CAPACITY, dtype=torch.bool)
    limit = meta(dtype=torch.float64)
    values = meta(CAPACITY, 300, dtype=torch.float32)
    into = canvas(300, torch.float16, channels_last=False)
    with compiled(90) as launches:
        halting.halt_tokens(scores, *layout(), 0.0, limit, False, 0, mask, values, into)
        halting.halt_tokens(scores, *layout(), 0.0, limit, True, 5, None, scores, None)
    check(launches, ["decide_kernel", "compact_kernel", "decide_kernel", "keep_kernel", "compact_kernel"])


@pytest.mark.parametrize(("architecture", "dtype", "dim", "classes"), HEADS)
def test_exit_head(architecture, dtype, dim, classes):
    with compiled(architecture) as launches:
        run_head(dim, classes, dtype)
    check(launches, ["head_kernel", "compact_kernel"])
    assert programs_per_multiprocessor(launches[0]) >= 2 and programs_per_multiprocessor(launches[1]) >= 10
    if classes == 150:  # pairs; less is what a token has one of: whether it halts
        assert 2 not in (access_bytes(launches[0])["store"] + access_bytes(launches[1])["store"])
        assert 2 not in access_bytes(launches[1])["load"]
    if architecture == 90 and dtype != torch.float32:
        assert launches[0].instructions(r"wgmma\.mma_async") > 0
    assert launches[0].instructions("cp.async.cg") > 0, "the matmul is not pipelined"


@pytest.mark.parametrize("architecture", [86, 90])
def test_exit_head_in_tf32(architecture):
    with matmuls_in("tf32"), compiled(architecture) as launches:
        run_head(1024, 150, torch.float32)
    launches[0].check()
    assert launches[0].instructions(r"mma.*tf32") > 0


@pytest.mark.parametrize("classes", [1, 128, 256, 300])
def test_exit_head_of_other_class_counts(classes):
    with compiled(90) as launches:
        run_head(1024, classes, torch.bfloat16, keep=5)
    check(launches, ["head_kernel", "keep_kernel", "compact_kernel"])


@pytest.mark.parametrize(
    ("architecture", "dim", "bias"), [(86, 5, "none"), (86, 257, "strided"), (90, 5, "strided"), (90, 257, "none")]
)
def test_exit_head_of_many_classes_and_an_odd_width(architecture, dim, bias):
    """More classes than stay in registers; what is not given, or not contiguous, changes the kernel's arguments."""
    tokens, weight = meta(CAPACITY, dim, dtype=torch.bfloat16), meta(300, dim, dtype=torch.bfloat16)
    given = None if bias == "none" else meta(300, 2, dtype=torch.bfloat16)[:, 0]
    into = canvas(300, torch.bfloat16)
    with compiled(architecture) as launches:
        halting.exit_head(tokens, None, None, weight, given, 1e-6, *layout(), 0.95, None, 0, None, into)
    check(launches, ["head_kernel", "compact_kernel"])


def test_gather_narrow_tokens():
    tokens, rows = meta(CAPACITY, 1, dtype=torch.bfloat16), integers(CAPACITY)
    with compiled(90) as launches:
        halting.gather_tokens(tokens, rows, integers(BATCH + 1), True)
        halting.gather_tokens_backward(tokens, rows, integers(BATCH + 1), CAPACITY)
    check(launches, ["gather_kernel", "gather_backward_kernel"])


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_gather_tokens(architecture, dtype):
    tokens, rows = meta(CAPACITY, 1024, dtype=dtype), integers(CAPACITY)
    with compiled(architecture) as launches:
        halting.gather_tokens(tokens, rows, integers(BATCH + 1), False)
        halting.gather_tokens_backward(tokens, rows, integers(BATCH + 1), CAPACITY)
    check(launches, ["gather_kernel", "gather_backward_kernel"])
    for launch in launches:
        assert launch.instructions(r"ld\.global\.v4") > 0 or launch.instructions(r"ld\.global.*v4\.b32") > 0


# Candidates of `tune`


@pytest.mark.parametrize("classes", [150, 171])
@pytest.mark.parametrize("architecture", CLASSES)
def test_candidates_of_the_head(architecture, classes):
    rows = head.candidates(classes, 1024, torch.bfloat16, architecture)
    key = f"exit_head half {classes} 1024"
    for launch in candidates_of(
        "head_kernel", architecture, key, rows, lambda: run_head(1024, classes, torch.bfloat16)
    ):
        assert warps_per_multiprocessor(launch) >= 8


@pytest.mark.parametrize("architecture", [90, *BESIDE_90])
def test_candidates_of_the_other_kernels(architecture):
    scores, tokens = meta(CAPACITY, 150, dtype=torch.bfloat16), meta(CAPACITY, 1024, dtype=torch.bfloat16)
    rows, cu_seqlens = integers(CAPACITY), integers(BATCH + 1)

    def halt() -> None:
        halting.halt_tokens(scores, *layout(), 0.95, None, True, 0, None, scores, canvas(150, torch.bfloat16))

    def move() -> None:
        halting.gather_tokens(tokens, rows, cu_seqlens, False)
        halting.gather_tokens_backward(tokens, rows, cu_seqlens, CAPACITY)

    for name, key, candidates, run, warps in (
        ("decide_kernel", "decide half 150", decision.DECIDE_ROWS, halt, 16),
        ("compact_kernel", "compact half 150", compaction.COMPACT_ROWS, halt, 28),
        ("gather_kernel", "gather half 1024", gather.GATHER_TILES, move, 32),
        ("gather_backward_kernel", "gather half 1024", gather.GATHER_TILES, move, 32),
    ):
        for launch in candidates_of(name, architecture, key, candidates, run):
            assert warps_per_multiprocessor(launch) >= warps, name
