"""Every kernel that ``tune`` measures takes the row it is told to take, and is right with every candidate."""

import pytest
import torch
from standin.rivals import OnCPU

from step_kernels.triton.attention.launch import _Plan
from step_kernels.triton.common import tuned
from step_kernels.triton.linear import launch as linear
from step_kernels.triton.norm import launch as norm
from step_kernels.tune.measure import measure
from step_kernels.tune.sizes import Sizes
from step_kernels.tune.works import works

SIZES = Sizes(dim=32, num_heads=2, hidden=64, cells=40, batch=2, device=torch.device("cpu"), dtype=torch.float16)
WORKS = {work.key: work for work in works(SIZES)}


@pytest.mark.parametrize("key", WORKS)
def test_candidates(key, monkeypatch):
    taken, settings, plan_of = [], linear.settings, _Plan.of

    def spied(kernel, *rest, **named):
        plan = plan_of(kernel, *rest, **named)
        taken.extend([plan.tiles] * key.startswith(kernel))
        return plan

    monkeypatch.setattr(linear, "settings", lambda tiles, *rest: taken.append(tiles) or settings(tiles, *rest))
    monkeypatch.setattr(_Plan, "of", spied)
    monkeypatch.setattr(norm, "num_programs", lambda x, tiles, most: taken.append((tiles["ROWS"], most[0])) or 1)
    work = WORKS[key]
    with OnCPU() as others:
        found = measure(work, SIZES.dtype, lambda call: 1.0, 0)
    assert not found.refused and set(found.milliseconds) == set(work.candidates) and len(work.candidates) > 1
    assert taken == [row for row in work.candidates if row not in (tuned.TRITON, tuned.VARLEN)]
    assert len(others.seen) == work.candidates.count(tuned.VARLEN)
