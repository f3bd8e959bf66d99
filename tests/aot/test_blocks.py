"""The kernels of blocks of cells compile for every architecture, fit it, and spill nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, candidates_of, check, compiled, meta
from aot.sass import access_bytes, programs_per_multiprocessor, warps_per_multiprocessor

from step_kernels.triton import layout, merge, scatter
from step_kernels.triton.common import cells as blocks

BATCH, ROWS, COLS, WIDTH = 8, 64, 64, 1024
EVERYWHERE = [(architecture, torch.bfloat16) for architecture in (90, *BESIDE_90)]
ON_HOPPER = [(90, torch.float32), (90, torch.float16)]


def a_layout() -> tuple[torch.Tensor, torch.Tensor]:
    capacity = BATCH * (1 + ROWS * COLS)
    return meta(BATCH + 1, dtype=torch.int32), meta(capacity, 4, dtype=torch.int32)


@pytest.mark.parametrize(("architecture", "dtype"), EVERYWHERE + ON_HOPPER)
def test_merge_tokens(architecture, dtype):
    cu_seqlens, cells = a_layout()
    tokens, prefix = meta(BATCH, ROWS * COLS, WIDTH, dtype=dtype), meta(1, WIDTH, dtype=dtype)
    with compiled(architecture) as launches:
        out = merge.merge_tokens(tokens, cu_seqlens, cells, ROWS, COLS, prefix, False)
        merge.merge_tokens_backward(out, cu_seqlens, cells, ROWS, COLS, 1)
    check(launches, ["reduce_blocks_kernel", "expand_blocks_kernel", "sum_prefix_rows_kernel"])
    accesses = access_bytes(launches[0])
    assert accesses["load"][16] >= 2 and min(accesses["store"]) >= 8, accesses
    assert programs_per_multiprocessor(launches[0]) >= 12


@pytest.mark.parametrize(("architecture", "dtype"), EVERYWHERE + ON_HOPPER)
def test_scatter(architecture, dtype):
    cu_seqlens, cells = a_layout()
    values = meta(cells.shape[0], 150, dtype=dtype)
    where = meta(cells.shape[0], dtype=torch.bool)
    with compiled(architecture) as launches:
        canvas = scatter.scatter_back(values, cu_seqlens, cells, ROWS, COLS, None)
        scatter.scatter_into(canvas.permute(0, 3, 1, 2), values, cu_seqlens, cells, where)
        scatter.scatter_back_backward(canvas, cu_seqlens, cells, where)
        layout.layout_sides(cu_seqlens, cells, ROWS, COLS)
    expand = ["expand_blocks_kernel"]
    check(launches, [*expand, *expand, "reduce_blocks_kernel", *expand])
    for launch in launches[:2]:  # 150 classes: pairs
        accesses = access_bytes(launch)
        assert set(accesses["store"]) == {2 * dtype.itemsize}, accesses
        assert min(accesses["load"]) >= (1 if launch is launches[1] else 4), "1: where"
        assert programs_per_multiprocessor(launch) >= 12


@pytest.mark.parametrize(("architecture", "dtype"), [*EVERYWHERE, (90, torch.float32)])
def test_candidates(architecture, dtype):
    cu_seqlens, cells = a_layout()
    tokens, kind = meta(BATCH, ROWS * COLS, WIDTH, dtype=dtype), "float" if dtype == torch.float32 else "half"

    def merged() -> None:
        merge.merge_tokens(tokens, cu_seqlens, cells, ROWS, COLS, None, False)

    for launch in candidates_of(
        "reduce_blocks_kernel", architecture, f"reduce_blocks {kind} 1024", blocks.REDUCE_ROWS, merged
    ):
        assert warps_per_multiprocessor(launch) >= 28
    for width in (150, 1024):
        values = meta(cells.shape[0], width, dtype=dtype)

        def scattered(values: torch.Tensor = values) -> None:
            scatter.scatter_back(values, cu_seqlens, cells, ROWS, COLS, None)

        key = f"expand_blocks {kind} {width}"
        for launch in candidates_of("expand_blocks_kernel", architecture, key, blocks.EXPAND_ROWS, scattered):
            assert warps_per_multiprocessor(launch) >= 28
