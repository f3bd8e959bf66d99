"""Policies decide without the host: a fake tensor has a shape and no values, so any read of a value raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from step_kernels.model import OraclePolicy, Policy, PolicyNet, QuotaPolicy, VariancePolicy

PATCH, GRID = 16, (17, 9)
POLICIES: dict[str, Callable[[], Policy]] = {
    "variance": lambda: VariancePolicy(0.1),
    "oracle": lambda: OraclePolicy.from_labels(torch.zeros(2, 17 * PATCH - 3, 9 * PATCH, dtype=torch.uint8)),
    "network": lambda: PolicyNet(width=2).eval(),
    "quota of variance": lambda: QuotaPolicy(VariancePolicy(0.1), 3),
    "quota of a network": lambda: QuotaPolicy(PolicyNet(width=2).eval(), 3),
}


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POLICIES)
def test_forward_reads_no_value(name: str, dtype: torch.dtype, deployed: bool) -> None:
    policy = POLICIES[name]().to(dtype)
    policy = policy.deployed() if deployed else policy
    mode = FakeTensorMode()  # refuses real tensors, so nothing of the policy is left out
    policy._apply(mode.from_tensor)
    with mode, torch.no_grad():
        images = torch.empty(2, 3, GRID[0] * PATCH, GRID[1] * PATCH, dtype=dtype)
        layout = policy(images, patch_size=PATCH, num_prefix=1)
    assert isinstance(layout.cells, FakeTensor) and isinstance(layout.cu_seqlens, FakeTensor)
    assert layout.capacity == 2 * (1 + GRID[0] * GRID[1]) and not layout.trimmed


class Syncing(VariancePolicy):
    def score_thresholds(self, sides: object) -> float:
        return -self.threshold.item()


def test_a_policy_that_reads_a_value_is_found() -> None:
    policy, mode = Syncing(0.1), FakeTensorMode()
    policy._apply(mode.from_tensor)
    with mode, pytest.raises(DataDependentOutputException):
        policy(torch.empty(1, 3, 4 * PATCH, 4 * PATCH), patch_size=PATCH)
