"""Losses and gradients of training, against plain PyTorch and differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from train_cases import items, small_segmenter

import step_kernels as sk
from step_kernels.model import OraclePolicy
from step_kernels.model.train import (
    Objective,
    block_purity,
    consistency_loss,
    exit_loss,
    merging_cost,
    merging_loss,
    policy_loss,
    segmentation_loss,
)


def test_purity_by_hand() -> None:
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[0, 0, 0] = 255  # ignored
    labels[0, 31, 31] = 3
    labels[0, :16, 16:] = 255
    fine, coarse = block_purity(labels, (4, 2), patch_size=8)
    assert fine.tolist() == [[[1, -1], [1, 0]]] and coarse.tolist() == [[[0]]]


@pytest.mark.parametrize("size", [(32, 32), (29, 43)])
def test_purity_is_that_of_each_block_alone(size: tuple[int, int]) -> None:
    labels = torch.randint(0, 2, (2, *size), generator=torch.Generator().manual_seed(0)).cumsum(2) // 9
    labels[labels == 1] = -1
    for side, found in zip((2, 4), block_purity(labels, (2, 4), patch_size=4, ignore_index=-1), strict=True):
        for b, row, col in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
            pixels = 4 * side
            block = labels[b, row * pixels : (row + 1) * pixels, col * pixels : (col + 1) * pixels]
            kinds = block[block != -1].unique()
            assert found[b, row, col] == (-1 if len(kinds) == 0 else len(kinds) == 1)


def test_policy_loss_counts_labelled_blocks_and_sides_alike() -> None:
    purity = [torch.tensor([[[1, 0], [-1, -1]]]), torch.tensor([[[1]]]), torch.tensor([[[-1]]])]
    logits = [torch.tensor([[[2.0, 1.0], [50.0, -50.0]]]), torch.tensor([[[-1.0]]]), torch.tensor([[[9.0]]])]
    sides = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2, math.log1p(math.exp(1))
    torch.testing.assert_close(policy_loss(logits, purity), torch.tensor(sum(sides) / 2))
    assert policy_loss([logits[2]], [purity[2]]) == 0
    with pytest.raises(ValueError, match="logits: expected 3 maps, one for each side, got 2"):
        policy_loss(logits[:2], purity)


@pytest.mark.parametrize("size", [(32, 32), (27, 30)])
def test_segmentation_loss_is_cross_entropy_of_what_predict_upsamples(size: tuple[int, int]) -> None:
    scores, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, *size))
    labels[:, :3] = 255
    pixels = F.interpolate(scores, size=(32, 32), mode="bilinear")[:, :, : size[0], : size[1]]
    expected = F.cross_entropy(pixels, labels, ignore_index=255)
    torch.testing.assert_close(segmentation_loss(scores, labels, patch_size=8), expected)
    torch.testing.assert_close(segmentation_loss(scores.log_softmax(1), labels, patch_size=8), expected)
    assert segmentation_loss(scores, torch.full_like(labels, 255), patch_size=8) == 0
    with pytest.raises(ValueError, match="scores: expected the grid 4 x 4 of the labels, got"):
        segmentation_loss(scores[:, :, :3], labels, patch_size=8)


def test_exit_loss_leaves_out_cells_without_a_token() -> None:
    layout = sk.SupertokenLayout.from_sides(torch.tensor([[[2, 2, 1, 1], [2, 2, 0, 0]]], dtype=torch.int32))
    scores, labels = torch.randn(layout.capacity, 3, requires_grad=True), torch.randint(0, 3, (1, 16, 32))
    seen = labels.clone()
    seen[:, 8:, 16:] = 255
    expected = segmentation_loss(sk.scatter_back(scores, layout), seen, patch_size=8)
    torch.testing.assert_close(exit_loss(scores, layout, labels, patch_size=8), expected)


def test_merging_costs_the_pixels_of_other_classes_by_weight() -> None:
    labels = torch.randint(0, 4, (2, 27, 45), generator=torch.Generator().manual_seed(3))
    labels[:, :16] = labels[:, :1, :1]
    labels[0, 16:24, 16:24] = 9  # no class
    weights = torch.tensor([1.0, 0.5, 2.0, 7.0])
    for side, found in zip((2, 4), merging_cost(labels, weights, (4, 2), patch_size=4, ignore_index=9), strict=True):
        assert found.shape == (2, 7 // side, 12 // side)
        for image, row, col in itertools.product(*map(range, found.shape)):
            size = 4 * side
            block = labels[image, row * size : (row + 1) * size, col * size : (col + 1) * size].flatten()
            counts = [int((block == number).sum()) for number in range(4)]
            common = counts.index(max(counts))
            wrong = sum(count * float(weights[n]) for n, count in enumerate(counts) if n != common)
            expected = wrong / sum(counts) if sum(counts) else -1
            assert float(found[image, row, col]) == pytest.approx(expected, abs=1e-6)
    for wrong in (4, -2):
        labels[1, 20, 3] = wrong
        with pytest.raises(ValueError, match=f"labels: expected some below 4, or 9, got {wrong}"):
            merging_cost(labels, weights, patch_size=4, ignore_index=9)


def test_merging_loss_is_least_where_the_score_tells_the_expected_cost() -> None:
    costs = torch.tensor([0.0, 0.3, 0.02, -1.0])  # the last one is not labelled; three blocks that look alike
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=50, tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = merging_loss([logit.expand(4)], [costs], tolerance=0.05)
        loss.backward()
        return loss

    optimizer.step(closure)
    mean = float(costs[:3].mean())
    torch.testing.assert_close(logit.detach().sigmoid(), torch.tensor(0.05 / (0.05 + mean)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="tolerance: expected a positive number"):
        merging_loss([logit.expand(4)], [costs], tolerance=0)


def test_consistency_is_zero_for_equals_and_flows_into_the_merged_alone() -> None:
    merged, dense = (torch.randn(2, 5, 3, 3, requires_grad=True) for _ in range(2))
    assert consistency_loss(merged, merged.detach() + 7).abs() < 1e-6
    loss = consistency_loss(merged, dense, temperature=2.0)
    p, q = (x.detach().div(2).softmax(1) for x in (dense, merged))
    torch.testing.assert_close(loss.detach(), 4 * (p * (p / q).log()).sum(1).mean())
    loss.backward()
    assert merged.grad is not None and dense.grad is None
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        consistency_loss(merged, dense, temperature=0)


def test_gradients_are_the_dense_models_where_nothing_merges() -> None:
    segmenter = small_segmenter(None, ())
    objective, (images, labels) = Objective(segmenter, "all"), items()
    learned = objective.learned()
    found = torch.autograd.grad(objective(images, labels)["loss"], list(learned.values()))
    tokens = segmenter.decoder.head(segmenter.encoder.vit(images)[:, 1:])
    scores = tokens.transpose(1, 2).unflatten(2, (8, 8))
    pixels = F.interpolate(scores, size=labels.shape[1:], mode="bilinear")
    expected = torch.autograd.grad(F.cross_entropy(pixels, labels), list(learned.values()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_with_merging_and_an_exit_are_differences() -> None:
    """fp64, along random directions through all parameters. Decisions stay: they are steps, without a gradient."""
    images, labels = items(2)
    segmenter = small_segmenter(OraclePolicy(labels), threshold=0.3)
    objective, images = Objective(segmenter.double(), "all"), images.double()
    learned = list(objective.learned().values())
    trace = segmenter.trace(images)
    assert trace.layout.capacity < 2 * 65 and 0 < trace.stages[0].halted.sum() < trace.layout.capacity - 2
    grads = torch.autograd.grad(objective(images, labels)["loss"], learned)
    for seed in range(3):
        torch.manual_seed(seed)
        way = [torch.randn_like(p) for p in learned]
        ends = []
        for step in (1e-6, -2e-6):  # there, and back past the start
            with torch.no_grad():
                for p, direction in zip(learned, way, strict=True):
                    p += step * direction
                ends.append(objective(images, labels)["loss"])
        with torch.no_grad():
            for p, direction in zip(learned, way, strict=True):
                p += 1e-6 * direction
        slope = (ends[0] - ends[1]) / 2e-6
        expected = sum((g * direction).sum() for g, direction in zip(grads, way, strict=True))
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("stage", "learns"),
    [("heads", "exits decoder"), ("exits", "exits decoder"), ("policy", "policy"), ("all", "vit exits decoder")],
)
def test_a_stage_learns_its_parts_alone(stage: str, learns: str) -> None:
    segmenter = small_segmenter()
    objective, (images, labels) = Objective(segmenter, stage), items()
    objective.learned()
    objective.train()
    objective(images, labels)["loss"].backward()
    for name, parameter in segmenter.named_parameters():
        part = name.removeprefix("encoder.").split(".")[0]
        assert (parameter.grad is not None) == (part in learns.split()), name
    assert segmenter.encoder.policy.training == (stage == "policy")


def test_what_is_not_trained_here_is_named() -> None:
    with pytest.raises(NotImplementedError, match="policy: expected a PolicyNet or CTSPolicy to train, got NoneType"):
        Objective(small_segmenter(None), "policy")
    with pytest.raises(ValueError, match="stage: expected one of"):
        Objective(small_segmenter(), "heads and all")
