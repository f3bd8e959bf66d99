"""`deployed` policies: batch norm folded, channels_last, thresholds shared, weights refreshed in place."""

from __future__ import annotations

import itertools
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from small_models import photographs
from tensors import IMAGE_VIEWS, error_rule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from step_kernels.model import OraclePolicy, Policy, PolicyNet, QuotaPolicy, VariancePolicy

PATCH = 16
GRIDS = [(16, 16), (17, 5), (6, 23)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Scores closer to a threshold than this may fall on its other side.
MARGINS = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


def trained_net(seed: int = 0, *, dtype: torch.dtype = torch.float32, **arguments: Any) -> PolicyNet:
    """Every weight, bias and running statistic drawn so that leaving one out moves the scores; features stay around one."""
    net = PolicyNet(**{"width": 4, **arguments}).eval()
    redraw(net, seed)
    return net.to(dtype)


@torch.no_grad()
def redraw(net: PolicyNet, seed: int) -> None:
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)


def images_of(grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return photographs(2, grid[0] * PATCH, grid[1] * PATCH, dtype=dtype)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def all_logits(net: PolicyNet, images: Tensor) -> Tensor:
    """The maps of every side, one after the other."""
    maps = net.logits(images, patch_size=PATCH)
    assert len(maps) == sum(side * PATCH <= min(images.shape[2:]) for side in net.sides)
    return torch.cat([logit.flatten() for logit in maps])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_as_exact_as_the_networks_own(dtype: torch.dtype) -> None:
    """All grids and networks together: the largest error of a few values alone is luck."""
    logits = []
    for grid, seed in itertools.product(GRIDS, range(4)):
        net, images = trained_net(seed, dtype=dtype), images_of(grid, dtype)
        copy, exact = net.deployed(), deepcopy(net).double()
        assert all(parameter.dtype == dtype for parameter in copy.parameters())
        logits.append([all_logits(copy, images), all_logits(net, images), all_logits(exact, images.double())])
    ours, plain, truth = (torch.cat(values) for values in zip(*logits, strict=True))
    error_rule(ours, plain, truth)
    error_rule(ours.float().sigmoid(), plain.float().sigmoid(), truth.sigmoid())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_decisions_agree_away_from_the_thresholds(grid: tuple[int, int], dtype: torch.dtype) -> None:
    net, images = trained_net(dtype=dtype), images_of(grid, dtype)
    own = net.scores(images, patch_size=PATCH)
    net.thresholds[: len(own)] = torch.stack([widest_gap(score) for score in own])
    copy, clear = net.deployed(), 0
    for score, folded, threshold in zip(own, copy.scores(images, patch_size=PATCH), net.thresholds, strict=False):
        far = (score - threshold).abs() > MARGINS[dtype]
        clear += int(far.sum())
        assert torch.equal((score > threshold)[far], (folded > threshold)[far])
        assert far.all() or dtype != torch.float32, "the layouts below need not be equal"
    assert 2 * clear > sum(score.numel() for score in own)
    if dtype == torch.float32:
        layouts = [policy(images, patch_size=PATCH, num_prefix=1) for policy in (net, copy)]
        assert torch.equal(layouts[0].cells, layouts[1].cells)
        assert len(layouts[0].sides().unique()) > 1


def widest_gap(scores: Tensor) -> Tensor:
    """The middle of the widest gap between two neighbours in the middle half of the scores."""
    ranked = scores.flatten().sort().values
    first, last = len(ranked) // 4, max(len(ranked) * 3 // 4, len(ranked) // 4 + 2)
    middle = ranked[first:last]
    best = middle.diff().argmax()
    return (middle[best] + middle[best + 1]) / 2


@pytest.mark.parametrize("shape", [(1, 3, 1024, 1024), (2, 3, 17 * PATCH, 5 * PATCH)])
def test_flops_are_the_networks(shape: tuple[int, ...]) -> None:
    net = PolicyNet(width=4).to("meta").eval()
    counts = []
    for policy in (net, net.deployed()):
        with FlopCounterMode(display=False) as counter:
            policy.scores(torch.empty(shape, device="meta"), patch_size=PATCH)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Calls(TorchDispatchMode):
    """Counts the aten operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["plain", *IMAGE_VIEWS])
def test_features_are_channels_last_after_one_copy(view: str, dtype: torch.dtype) -> None:
    """No operation in between (resize, convolution, pooling, residual) falls back to the other memory format."""
    copy, images = trained_net(dtype=dtype).deployed(), images_of((16, 48), dtype)
    images = images if view == "plain" else IMAGE_VIEWS[view](images)
    seen: list[Tensor] = []
    for module in copy.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with Calls() as calls:
        logits = copy.logits(images, patch_size=PATCH)
    assert len(seen) == 2 * (1 + 6 * 2 + 3 * 2 + 4) and len(logits) == 4
    for features in seen:
        assert features.is_contiguous(memory_format=torch.channels_last) and features.dtype == dtype
    assert calls.count["clone"] == (view in ("plain", "cropped", "upside_down_memory")) and not calls.count["_to_copy"]
    assert calls.count["convolution"] == len(seen) // 2
    assert not [name for name in calls.count if "batch_norm" in name]


def test_weights_are_channels_last_without_gradients() -> None:
    copy = trained_net(in_chans=1).deployed()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    for name, parameter in copy.named_parameters():
        assert not parameter.requires_grad, name
        if parameter.ndim == 4:
            rows, cols = parameter.shape[2:]
            # Strides, because is_contiguous holds in both formats where a dimension is 1, and PyTorch then takes the other.
            channels = parameter.shape[1]
            assert parameter.stride() == (channels * rows * cols, 1, channels * cols, channels), name
    assert not copy.logits(images_of((4, 4))[:, :1], patch_size=PATCH)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_are_shared(dtype: torch.dtype) -> None:
    net, images = trained_net(dtype=dtype, sides=(2,)), images_of((4, 6), dtype)
    copy = net.deployed()
    assert copy.thresholds is net.thresholds and net.thresholds.dtype == torch.float32
    for threshold, side in ((0.0, 2), (1.0, 1)):
        net.thresholds.fill_(threshold)
        assert copy(images, patch_size=PATCH).sides().unique().tolist() == [side]


def test_a_network_in_training_mode_is_folded_by_its_running_statistics() -> None:
    net, images = trained_net(), images_of((4, 6))
    expected = net.deployed().scores(images, patch_size=PATCH)
    before, state = state_of(net), torch.get_rng_state()
    copy = net.train().deployed()
    assert net.training and not copy.training and all(parameter.requires_grad for parameter in net.parameters())
    assert net.trunk[0][0].weight.is_contiguous()
    assert torch.equal(torch.get_rng_state(), state)
    for _ in range(2):
        scores = copy.scores(images, patch_size=PATCH)
        assert all(torch.equal(a, b) for a, b in zip(scores, expected, strict=True))
        copy.train()  # changes nothing: there is no batch norm left
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refreshing_keeps_the_storages_and_follows_the_weights(dtype: torch.dtype, inference: bool) -> None:
    net, images = trained_net(dtype=dtype), images_of((16, 17), dtype)
    with torch.inference_mode(inference):
        copy = net.deployed()
    places = {name: tensor.data_ptr() for name, tensor in copy.state_dict().items()}
    assert len(set(places.values())) == len(places) and not set(places.values()) & {
        parameter.data_ptr() for parameter in net.parameters()
    }
    redraw(net, seed=1)
    net.train()
    old, new = copy.scores(images, patch_size=PATCH), net.deployed().scores(images, patch_size=PATCH)
    copy.refresh_from(net)
    for before, after, expected in zip(old, copy.scores(images, patch_size=PATCH), new, strict=True):
        assert torch.equal(after, expected) and not torch.equal(before, expected)
    assert {name: tensor.data_ptr() for name, tensor in copy.state_dict().items()} == places
    assert copy.thresholds is net.thresholds
    assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_refreshing_follows_thresholds_that_are_no_longer_shared() -> None:
    """As after ``net.to(device)`` and back, or from a network loaded anew."""
    net = trained_net()
    copy, other = net.deployed(), trained_net(thresholds=0.25)
    copy.refresh_from(other)
    assert copy.thresholds.tolist() == [0.25] * 4 and copy.thresholds is not other.thresholds


def test_a_convolution_with_bias_and_a_synchronised_norm_fold_too() -> None:
    net, images = trained_net(), images_of((4, 6))
    conv = net.trunk[0][0]
    conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    expected = net.double().logits(images.double(), patch_size=PATCH)[0]
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    copy = synchronised.deployed()
    assert not any("Norm" in type(module).__name__ for module in copy.modules())
    torch.testing.assert_close(copy.logits(images.double(), patch_size=PATCH)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("original", "error", "message"),
    [
        (lambda: trained_net(width=8), ValueError, r"expected trunk.* float32 \[4, 3, 4, 4\] .* as this copy has, got"),
        (lambda: trained_net(dtype=torch.bfloat16), ValueError, r"expected trunk\S+ float32 .* got bfloat16"),
        (
            lambda: trained_net().to("meta"),
            ValueError,
            "expected trunk.* on cpu as this copy has, got float32 .* on meta",
        ),
        (lambda: trained_net(sides=(2, 4)), ValueError, r"expected sides \(2, 4, 8, 16\) as .* got \(2, 4\)"),
        (lambda: trained_net(input_scale=1.0), ValueError, "expected input_scale 0.5 as this copy has, got 1.0"),
        (lambda: VariancePolicy(0.1), TypeError, "expected a PolicyNet, got VariancePolicy"),
    ],
)
def test_another_network_is_refused_and_nothing_changes(original: Any, error: type[Exception], message: str) -> None:
    copy = trained_net().deployed()
    before = state_of(copy)
    with pytest.raises(error, match="original: " + message):
        copy.refresh_from(original())
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_only_a_deployed_copy_can_be_refreshed() -> None:
    with pytest.raises(ValueError, match=r"original: .* missing ones \['coarser.0.depthwise.1.bias'"):
        trained_net().refresh_from(trained_net())


def test_a_deployed_copy_can_be_deployed_and_moved() -> None:
    net, images = trained_net(), images_of((4, 6))
    copy = net.deployed()
    again = copy.deployed()
    again.refresh_from(net)
    assert torch.equal(again.logits(images, patch_size=PATCH)[0], copy.logits(images, patch_size=PATCH)[0])
    assert copy.double().logits(images.double(), patch_size=PATCH)[0].dtype == torch.float64


def test_quota_policies_deploy_their_scorer() -> None:
    net, images = trained_net(sides=(2,)), images_of((6, 9))
    policy = QuotaPolicy(net, 5)
    copy = policy.deployed()
    assert policy.scorer is net and copy.scorer.thresholds is net.thresholds
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    assert torch.equal(copy(images, patch_size=PATCH).cells, policy(images, patch_size=PATCH).cells)
    redraw(net, seed=1)
    chosen = copy(images, patch_size=PATCH).cells
    copy.refresh_from(policy)
    assert torch.equal(copy(images, patch_size=PATCH).cells, policy(images, patch_size=PATCH).cells)
    assert not torch.equal(copy(images, patch_size=PATCH).cells, chosen)
    with pytest.raises(ValueError, match="original: expected count 5 as this copy has, got 4"):
        copy.refresh_from(QuotaPolicy(net, 4))
    with pytest.raises(TypeError, match="original: expected a QuotaPolicy, got PolicyNet"):
        copy.refresh_from(net)


@pytest.mark.parametrize(
    "policy",
    [
        VariancePolicy(0.1),
        OraclePolicy.from_labels(torch.zeros(1, 8, 8, dtype=torch.uint8)),
        QuotaPolicy(VariancePolicy(0.1), 3),
    ],
)
def test_policies_with_nothing_to_prepare_deploy_themselves(policy: Policy) -> None:
    assert policy.deployed() is policy
    policy.refresh_from(policy)
    other = deepcopy(policy)
    with pytest.raises(
        ValueError, match=r"original: expected the .* itself, which is its own deployed policy, got another"
    ):
        policy.refresh_from(other)


def test_a_network_made_in_inference_mode_refreshes_its_copy() -> None:
    """The thresholds that they share could not be written outside of it."""
    images = images_of((6, 6))
    with torch.inference_mode():
        net = trained_net()
    copy = net.deployed()
    with torch.no_grad():
        next(copy.parameters()).zero_()
    copy.refresh_from(net)
    torch.testing.assert_close(all_logits(copy, images), all_logits(net, images))
