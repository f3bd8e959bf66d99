"""PolicyNet: cost, geometry of its score maps, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import photographs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from step_kernels.model import PolicyNet, StepEncoder, ViT


def test_costs_at_most_one_percent_of_vit_large_at_1024_px() -> None:
    images = torch.zeros(1, 3, 1024, 1024, device="meta")
    with torch.device("meta"):
        net, vit = PolicyNet(), ViT.preset("large", img_size=1024)
    with FlopCounterMode(display=False) as counter:
        net.scores(images, patch_size=16)
    tokens, dim = 64 * 64 + 1, 1024
    vit_flops = 24 * (2 * 12 * dim**2 * tokens + 4 * dim * tokens**2) + 2 * 16 * 16 * 3 * dim * 64 * 64
    assert vit_flops == pytest.approx(4.12e12, rel=0.01)  # the published figure, attention counted
    assert 0 < counter.get_total_flops() <= 0.01 * vit_flops
    assert vit.depth == 24 and vit.embed_dim == dim


@pytest.mark.parametrize(("patch_size", "scale"), [(8, 0.5), (14, 0.5), (16, 0.25), (16, 0.5), (16, 1.0)])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (2, 2), (3, 5), (17, 33)])
def test_one_score_per_whole_block(patch_size: int, scale: float, grid: tuple[int, int]) -> None:
    net = PolicyNet(input_scale=scale, width=2).eval()
    images = torch.randn(2, 3, grid[0] * patch_size, grid[1] * patch_size)
    scores = net.scores(images, patch_size=patch_size)
    sides = [side for side in (2, 4, 8, 16) if side <= min(grid)]
    assert [tuple(score.shape) for score in scores] == [(2, grid[0] // side, grid[1] // side) for side in sides]
    assert all(((score > 0) & (score < 1)).all() for score in scores)
    layout = net(images, patch_size=patch_size, num_prefix=1)
    layout.validate()
    assert layout.grid == grid


@pytest.mark.parametrize("deployed", [False, True])
def test_each_score_is_centred_on_its_own_block(deployed: bool) -> None:
    """With equal positive weights a change inside one block moves that block's score most, its neighbours' symmetrically."""
    net = PolicyNet(sides=(2,), width=4).double().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    net = net.deployed() if deployed else net
    images = torch.rand(1, 3, 14 * 16, 19 * 16, dtype=torch.float64)
    before = net.logits(images, patch_size=16)[0]
    for row, column in ((0, 0), (3, 3), (3, 4), (6, 8)):
        changed = images.clone()
        changed[:, :, row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32] += 1.0
        difference = (net.logits(changed, patch_size=16)[0] - before)[0]
        assert difference.argmax().item() == row * 9 + column
        if row == 3:
            window = difference[row - 2 : row + 3, column - 2 : column + 3]
            torch.testing.assert_close(window, window.flip(0, 1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sides", [(2,), (16,), (8, 2), (64, 4)])
def test_any_choice_of_sides(sides: tuple[int, ...]) -> None:
    net = PolicyNet(sides=sides, thresholds=0.0, width=2).eval()
    images = torch.randn(1, 3, 64 * 8, 64 * 8)
    assert net.scores(images, patch_size=8)[0].shape[1] == 64 // min(sides)
    # Threshold 0 takes every block: only the coarsest side is left.
    assert net(images, patch_size=8).lengths().tolist() == [(64 // max(sides)) ** 2]


def test_thresholds_belong_to_the_sides_they_were_given_for() -> None:
    net = PolicyNet(sides=(8, 2), thresholds=(1.0, 0.0), width=2).eval()  # never 8, always 2
    layout = net(torch.randn(1, 3, 128, 128), patch_size=16)
    assert layout.sides().unique().tolist() == [2]


def test_gradients_reach_every_parameter_through_the_logits() -> None:
    net = PolicyNet(width=4)
    images = photographs(2, 256, 256)
    loss = sum(logit.sigmoid().sub(0.3).square().mean() for logit in net.logits(images, patch_size=16))
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_encoder_keeps_its_policy_in_eval_mode() -> None:
    """Batch statistics would make an image's layout depend on its batch mates, and drift while the encoder trains."""
    net = PolicyNet(width=2)
    encoder = StepEncoder(ViT.preset("tiny", img_size=32, depth=1), net)
    assert not net.training
    encoder.train()
    assert encoder.vit.training and not net.training
    before = net.trunk[0][1].running_mean.clone()
    encoder(torch.randn(2, 3, 64, 64))
    assert torch.equal(net.trunk[0][1].running_mean, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"thresholds": (0.5, 0.5)}, ValueError, "thresholds: expected one number or 4, one per side, got 2"),
        ({"thresholds": np.full(4, 0.5)}, TypeError, "thresholds: expected one number or a list of 4, got ndarray"),
        ({"thresholds": torch.full((4,), 0.5)}, TypeError, r"thresholds: expected one .* got float32 \[4\]"),
        ({"thresholds": "0.55"}, TypeError, "thresholds: expected one number or a list of 4, got str"),
        ({"thresholds": True}, TypeError, "thresholds: expected a float, got bool"),
        ({"thresholds": (0.5, 0.5, "a", 0.5)}, TypeError, r"thresholds\[2\]: expected a float, got str 'a'"),
        ({"input_scale": 0.0}, ValueError, r"input_scale: expected a number in \(0, 1\], got 0"),
        ({"input_scale": 2.0}, ValueError, "input_scale: expected a number of at most 1, got 2"),
        ({"input_scale": float("nan")}, ValueError, "input_scale"),
        ({"input_scale": "x"}, TypeError, "input_scale: expected a float, got str 'x'"),
        ({"width": 0}, ValueError, "width: expected an int at least 1, got 0"),
        ({"width": 1.5}, TypeError, "width: expected an int, got float 1.5"),
        ({"width": "a"}, TypeError, "width: expected an int, got str 'a'"),
        ({"in_chans": 0}, ValueError, "in_chans: expected an int at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PolicyNet(**arguments)


def test_numbers_may_be_numpy_numbers() -> None:
    net = PolicyNet(thresholds=list(np.array([0.125, 0.25, 0.5, 0.75])), input_scale=np.float32(0.5), width=np.int64(2))
    assert net.thresholds.tolist() == [0.125, 0.25, 0.5, 0.75]
    assert PolicyNet(thresholds=np.float32(0.25), width=2).thresholds.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 4, 64, 64), ValueError, r"images: expected shape \[B, 3, H, W\], got \[1, 4, 64, 64\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16), TypeError, "images: expected torch.float32 as .* has, got"),
        (torch.zeros(1, 3, 64, 64, device="meta"), ValueError, "images: expected a tensor on cpu"),
    ],
)
def test_images_that_the_network_cannot_take_are_refused_by_name(
    images: torch.Tensor, error: type[Exception], message: str
) -> None:
    net = PolicyNet(width=2).eval()
    for run in (net, net.logits, net.scores):
        with pytest.raises(error, match=message):
            run(images, patch_size=16)
