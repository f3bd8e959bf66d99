"""Every kernel that ``tune`` measures takes the row it is told to take, and is right with every candidate."""

import pytest
import torch
from standin.rivals import OnCPU
from triton.runtime.interpreter import GridExecutor

from step_kernels.triton.attention.launch import _Plan
from step_kernels.triton.common import tuned
from step_kernels.triton.linear import launch as linear
from step_kernels.triton.norm import launch as norm
from step_kernels.tune.measure import measure
from step_kernels.tune.sizes import Sizes
from step_kernels.tune.works import works

SIZES = Sizes(
    dim=32, num_heads=2, hidden=64, grid=8, batch=2, device=torch.device("cpu"), dtype=torch.float16, classes=6
)
WORKS = {work.key: work for work in works(SIZES)}
# What of a launch its row decides, for the kernels whose launchers pass on all of them, and how.
LAUNCHES = {
    "exit_head": ("head_kernel", ("ROWS", "COLUMNS", "num_warps"), lambda row: row[:3]),
    "compact": ("compact_kernel", ("ROWS", "CELLS", "num_warps"), lambda row: row),
    "decide": ("decide_kernel", ("ROWS", "CLASSES", "num_warps"), lambda row: (row[0], min(row[1], 8), row[2])),
    "gather": ("gather_kernel", ("ROWS", "num_warps"), lambda row: (min(row[0] // 32, 128), row[1])),
    "merge_patches": ("merge_patches_kernel", ("SMALL_SIDES", "SHARES", "num_warps"), lambda row: SHARED[row[:2]]),
    "reduce_blocks": ("reduce_blocks_kernel", ("BLOCK_K", "BLOCK_C", "num_warps"), lambda row: (row[0], 32, row[2])),
    "expand_blocks": ("expand_blocks_kernel", ("BLOCK_CELLS", "num_warps"), lambda row: row),
}
# Blocks of 8 x 8 and, if a program reads 3 tiles at most, 4 x 4 patches of 16 x 16 x 3 are shared out.
SHARED = {(2048, 6): (3, 4, 4), (2048, 3): (2, 2, 4), (2048, 12): (3, 2, 4), (1024, 12): (3, 4, 4)}


@pytest.mark.parametrize("key", WORKS)
def test_candidates(key, monkeypatch):
    taken, settings, plan_of, run = [], linear.settings, _Plan.of, GridExecutor.__call__
    kernel, names, expected = LAUNCHES.get(key.split()[0], ("", (), lambda row: row))

    def spied(kernel, *rest, **named):
        plan = plan_of(kernel, *rest, **named)
        taken.extend([plan.tiles] * key.startswith(kernel))
        return plan

    def launched(self, *arguments, **named):
        if self.fn.__name__ == kernel:
            taken.append(tuple(named[name] for name in names))
        return run(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    monkeypatch.setattr(linear, "settings", lambda tiles, *rest: taken.append(tiles) or settings(tiles, *rest))
    monkeypatch.setattr(_Plan, "of", spied)
    monkeypatch.setattr(norm, "num_programs", lambda x, tiles, most: taken.append((tiles["ROWS"], most[0])) or 1)
    work = WORKS[key]
    with OnCPU() as others:
        found = measure(work, SIZES.dtype, lambda call: 1.0, 0)
    assert not found.refused and set(found.milliseconds) == set(work.candidates) and len(work.candidates) > 1
    assert taken == [expected(row) for row in work.candidates if row not in (tuned.TRITON, tuned.VARLEN)]
    assert len(others.seen) == work.candidates.count(tuned.VARLEN)


def test_a_candidate_that_writes_nothing_is_wrong(monkeypatch):
    """Though the one before it left the right results in the same memory."""
    run = GridExecutor.__call__

    def lazy(self, *arguments, **named):
        if named.get("CELLS") != 8:
            return run(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", lazy)
    (key,) = (key for key in WORKS if key.startswith("compact"))
    found = measure(WORKS[key], SIZES.dtype, lambda call: 1.0, 0)
    assert {row[1] for row in found.refused} == {8} and {row[1] for row in found.milliseconds} == {16, 32}
