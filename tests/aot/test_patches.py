"""The kernels of patches compile for every architecture, fit it, spill nothing, and load whole pixel rows in 16-byte pieces."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, Launch, candidates_of, check, compiled, meta
from aot.sass import warps_per_multiprocessor

from step_kernels.triton import merge
from step_kernels.triton.merge.patches import MERGE_ROWS

BATCH, ROWS, COLS, WIDTH = 8, 64, 64, 1024
# Every configuration on sm_90; these kernels have no table of tiles, so one of them elsewhere.
CASES = [(90, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.uint8)]
WORD = {torch.float32: "b32", torch.float16: "b16", torch.bfloat16: "b16", torch.uint8: "b8"}


def a_layout() -> tuple[torch.Tensor, torch.Tensor]:
    return meta(BATCH + 1, dtype=torch.int32), meta(BATCH * (1 + ROWS * COLS), 4, dtype=torch.int32)


def images_of(patch_size: int, dtype: torch.dtype) -> torch.Tensor:
    return meta(BATCH, 3, ROWS * patch_size, COLS * patch_size, dtype=dtype)


def loads(launch: Launch, word: str) -> int:
    """Load instructions of one element each."""
    return launch.instructions(rf"ld\.global(\.L1::\w+)*\.{word} ")


@pytest.mark.parametrize(
    ("architecture", "dtype", "patch_size", "bilinear"),
    [
        *((*case, 16, bilinear) for case in CASES for bilinear in (False, True)),
        *((90, torch.bfloat16, 14, bilinear) for bilinear in (False, True)),
        *((architecture, torch.bfloat16, 16, False) for architecture in BESIDE_90),
    ],
)
def test_merge_patches(architecture, dtype, patch_size, bilinear):
    statistics = [meta(3)] * 2 if dtype == torch.uint8 else [None] * 2
    images, metadata = images_of(patch_size, dtype), a_layout()
    with compiled(architecture) as launches:
        out = merge.merge_patches(images, *metadata, patch_size, bilinear, *statistics, False)
        merge.merge_patches_backward(out, *metadata, list(images.shape), patch_size, bilinear, statistics[1])
    forward, backward = launches
    assert [forward.name, backward.name] == ["merge_patches_kernel", "merge_patches_backward_kernel"]
    forward.check()
    backward.check(spilled=64)
    if not bilinear:
        wide = forward.instructions(r"ld\.global(\.L1::\w+)*\.v4\.b32 ")
        if dtype.itemsize == 2:  # of 8 pixels: one at side 1, two at sides 2 to 32, four at side 64
            assert wide >= (15 if patch_size == 16 else 12)
        assert loads(forward, WORD[dtype]) == 0 or dtype == torch.float32  # metadata are words of 32 bits as well


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("architecture", [90, *BESIDE_90])
def test_candidates(architecture, patch_size):
    images, key = images_of(patch_size, torch.bfloat16), f"merge_patches 2 {patch_size}"

    def merged() -> None:
        merge.merge_patches(images, *a_layout(), patch_size, False, None, None, False)

    for launch in candidates_of("merge_patches_kernel", architecture, key, MERGE_ROWS, merged):
        assert warps_per_multiprocessor(launch) >= 24


@pytest.mark.parametrize("statistics", ["mean", "std"])
def test_every_combination_of_statistics(statistics):
    given = meta(3)
    mean, std = (given, None) if statistics == "mean" else (None, given)
    with compiled(90) as launches:
        merge.merge_patches(images_of(16, torch.uint8), *a_layout(), 16, False, mean, std, True)
    check(launches, ["merge_patches_kernel"])


@pytest.mark.parametrize("patch_size", [1, 32])
def test_other_patch_sizes(patch_size):
    images, metadata = images_of(patch_size, torch.float32), a_layout()
    with compiled(90) as launches:
        out = merge.merge_patches(images, *metadata, patch_size, False, None, None, True)
        merge.merge_patches_backward(out, *metadata, list(images.shape), patch_size, False, None)
    for launch in launches:
        launch.check(spilled=64 if "backward" in launch.name else 0)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(
    ("architecture", "dtype", "expected_tokens"),
    [(90, torch.float32, None), (80, torch.bfloat16, None), (90, torch.bfloat16, 13000)],
)
def test_embed_patches(architecture, dtype, expected_tokens, positions):
    """Without an expected count: in exact mode."""
    images, metadata = images_of(16, dtype), a_layout()
    weight, bias, prefix = (meta(*shape, dtype=dtype) for shape in ((WIDTH, 3, 16, 16), (WIDTH,), (1, WIDTH)))
    pos_embed = meta(ROWS * COLS, WIDTH, dtype=dtype) if positions else None
    with compiled(architecture) as launches:
        out = merge.embed_patches(
            images,
            weight,
            bias,
            pos_embed,
            prefix,
            None,
            None,
            *metadata,
            False,
            not expected_tokens,
            False,
            expected_tokens,
        )
        needed = [True, True, True, positions, True]
        merge.embed_patches_backward(out, images, weight, None, None, *metadata, False, 1, needed)
    assert [launch.name for launch in launches] == [
        "merge_patches_kernel",
        *(["linear_kernel"] if expected_tokens else []),
        "reduce_blocks_kernel",
        "merge_patches_backward_kernel",
        "merge_patches_kernel",
        *(["expand_blocks_kernel"] if positions else []),
        "sum_prefix_rows_kernel",
    ]
    for launch in launches:
        launch.check(spilled=64 if launch.name == "merge_patches_backward_kernel" else 0)
