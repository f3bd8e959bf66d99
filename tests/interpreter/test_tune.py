"""Every kernel that ``tune`` measures takes the row it is told to take, and is right with every candidate."""

import pytest
import torch

from step_kernels.triton.attention.launch import _Plan
from step_kernels.triton.linear import launch as linear
from step_kernels.tune.measure import measure
from step_kernels.tune.sizes import Sizes
from step_kernels.tune.works import works

SIZES = Sizes(dim=32, num_heads=2, hidden=64, cells=40, batch=2, device=torch.device("cpu"), dtype=torch.float16)
WORKS = {work.key: work for work in works(SIZES)}


@pytest.mark.parametrize("key", WORKS)
def test_candidates(key, monkeypatch):
    taken, settings, grid = [], linear.settings, _Plan.grid
    monkeypatch.setattr(linear, "settings", lambda tiles, *rest: taken.append(tiles) or settings(tiles, *rest))
    monkeypatch.setattr(_Plan, "grid", lambda plan, *rest: taken.append(plan.tiles) or grid(plan, *rest))
    work = WORKS[key]
    found = measure(work, SIZES.dtype, lambda call: 1.0, 0)
    assert not found.refused and set(found.milliseconds) == set(work.candidates)
    assert taken == list(work.candidates) and len(set(taken)) > 1
