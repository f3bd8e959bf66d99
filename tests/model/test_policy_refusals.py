"""What the policies refuse: arguments and images of a wrong type, value or shape, each by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import photographs
from torch import nn
from torch.nn.utils import prune

from step_kernels.model import OraclePolicy, Policy, PolicyNet, QuotaPolicy, VariancePolicy

PATCH = 4
IMAGES = photographs(2, 8 * PATCH, 8 * PATCH)


@pytest.mark.parametrize("reduction", [0.99, -1.0, float("nan")])
def test_calibration_refuses_reductions_below_one(reduction: float) -> None:
    with pytest.raises(ValueError, match="reduction: expected a number of at least 1"):
        VariancePolicy.calibrate(IMAGES, reduction=reduction, patch_size=PATCH)


def test_calibration_refuses_arguments_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="reduction: expected a float, got str '2'"):
        VariancePolicy.calibrate(IMAGES, reduction="2", patch_size=PATCH)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sides: expected"):
        VariancePolicy.calibrate(IMAGES, patch_size=PATCH, sides=2)  # type: ignore[arg-type]
    for images, name in (([1.0], r"images\[0\]"), (1.0, "images"), ([IMAGES, (IMAGES.byte(), 3)], r"images\[1\]")):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            VariancePolicy.calibrate(images, patch_size=PATCH)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images: expected at least one image, got none"):
        VariancePolicy.calibrate([], patch_size=PATCH)


def test_quota_policy_refusals() -> None:
    with pytest.raises(ValueError, match="count: expected at most 2, the 2x2 blocks of a 3 x 5 grid, got 3"):
        QuotaPolicy(VariancePolicy(0.1), 3)(photographs(2, 3 * PATCH, 5 * PATCH), patch_size=PATCH)
    with pytest.raises(ValueError, match="count"):
        QuotaPolicy(VariancePolicy(0.1), -1)
    with pytest.raises(TypeError, match="scorer: expected a Policy, got int"):
        QuotaPolicy(3, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scorer: expected a policy that scores blocks of side 2, got sides \(4, 8\)"):
        QuotaPolicy(VariancePolicy(0.1, (4, 8)), 1)


def test_hooks_on_what_a_policy_does_not_call_are_refused() -> None:
    policy = QuotaPolicy(VariancePolicy(0.1), 3)
    policy.scorer.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"scorer: VariancePolicy .*hooks"):
        policy(IMAGES, patch_size=PATCH)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, lambda part: part.register_forward_hook(lambda *_: None), r"trunk\.0\.0: Conv2d .*hooks"),
        (0, lambda part: prune.l1_unstructured(part, "weight", 0.5), r"trunk\.0\.0: Conv2d .*hooks"),
        (0, nn.utils.parametrizations.weight_norm, r"trunk\.0\.0: ParametrizedConv2d .*expected Conv2d"),
        (1, lambda part: part.register_forward_hook(lambda *_: None), r"trunk\.0\.1: BatchNorm2d .*hooks"),
    ],
)
def test_what_a_deployed_copy_would_fold_away_is_refused(
    part: int, change: Callable[[nn.Module], object], message: str
) -> None:
    net = PolicyNet(width=4).eval().requires_grad_(False)
    change(net.trunk[0][part])
    with pytest.raises(NotImplementedError, match=message):
        net.deployed()


def test_oracle_policy_refusals() -> None:
    for ignore_index in (None, 255.0, "255"):
        with pytest.raises(TypeError, match="ignore_index: expected an int, got"):
            OraclePolicy(torch.zeros(1, 16, 16, dtype=torch.uint8), ignore_index=ignore_index)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ignore_index: expected an int between"):
        OraclePolicy(torch.zeros(1, 16, 16, dtype=torch.uint8), ignore_index=2**64)
    with pytest.raises(TypeError, match="labels: expected dtype"):
        OraclePolicy.from_labels(torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="labels: expected shape"):
        OraclePolicy.from_labels(torch.zeros(16, 16, dtype=torch.uint8))
    policy = OraclePolicy.from_labels(torch.zeros(2, 16, 16, dtype=torch.uint8))
    for shape in ((1, 3, 16, 16), (2, 3, 20, 16), (2, 3, 16, 12)):
        with pytest.raises(ValueError, match="images: expected the 2 images of the labels, 16 x 16 before padding"):
            policy(torch.zeros(shape), patch_size=PATCH)


POLICIES = {
    "net": lambda: PolicyNet(),
    "variance": lambda: VariancePolicy(0.1),
    "quota": lambda: QuotaPolicy(VariancePolicy(0.1), 0),
}


@pytest.mark.parametrize("name", POLICIES)
def test_bad_calls_are_refused_by_name(name: str) -> None:
    policy = POLICIES[name]()
    with pytest.raises(ValueError, match="images: expected height and width padded to multiples of patch_size=4"):
        policy(torch.zeros(1, 3, 16, 18), patch_size=PATCH)
    with pytest.raises(ValueError, match="images: expected shape"):
        policy(torch.zeros(3, 16, 16), patch_size=PATCH)
    with pytest.raises(TypeError, match="images: expected dtype"):
        policy(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), patch_size=PATCH)
    with pytest.raises(ValueError, match="patch_size"):
        policy(torch.zeros(1, 3, 16, 16), patch_size=0)


@pytest.mark.parametrize("kind", [VariancePolicy, PolicyNet])
@pytest.mark.parametrize(
    ("sides", "error"),
    [
        ((), TypeError),
        ((2, 2), ValueError),
        ((3,), ValueError),
        ((1, 2), ValueError),
        ((128,), ValueError),
        ((2.0,), TypeError),
        (2, TypeError),
        ("2", TypeError),
        (None, TypeError),
    ],
)
def test_bad_sides_are_refused_by_name(kind: type[Policy], sides: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="sides"):
        kind(sides=sides, **({"threshold": 0.1} if kind is VariancePolicy else {}))


@pytest.mark.parametrize("threshold", ["a", None, True, torch.tensor([0.1, 0.2])])
def test_variance_policy_refuses_thresholds_that_are_no_number(threshold: object) -> None:
    with pytest.raises(TypeError, match="threshold: expected a float, got"):
        VariancePolicy(threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [-1.0, float("nan"), 95])
def test_thresholds_without_a_meaning_are_refused_in_the_constructor_and_afterwards(number: float) -> None:
    policy, net = VariancePolicy(0.1), PolicyNet((2, 4), (0.25, 0.5), width=2)
    if number != 95:  # a deviation has no upper limit
        with pytest.raises(ValueError, match=f"^threshold: expected a number of at least 0, got {number:g}"):
            VariancePolicy(number)
        with pytest.raises(ValueError, match=r"^threshold: expected"):
            policy.threshold = number
    for wrong, name in ((number, "thresholds"), ((0.5, number), r"thresholds\[1\]")):
        with pytest.raises(ValueError, match=rf"^{name}: expected a number of at (least 0|most 1), got {number:g}"):
            PolicyNet((2, 4), wrong, width=2)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            net.thresholds = wrong
    assert policy.threshold == torch.tensor(0.1) and net.thresholds.tolist() == [0.25, 0.5]
