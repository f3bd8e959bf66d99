"""Metrics against plain numpy, controls of the right size, thresholds for a budget, and the whole recipe in small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_cases import CLASSES, INFO, PATCH, SIZE, items, small_segmenter

from step_kernels.model import (
    OraclePolicy,
    PolicyNet,
    StepEncoder,
    StepSegmenter,
    VariancePolicy,
    load_checkpoint,
    predict_windows,
)
from step_kernels.model.cli.evaluate import variants_of
from step_kernels.model.train import Confusion, Scenes, block_purity, calibrate_exits, calibrate_policy, evaluate
from step_kernels.model.train.calibration import by_purity
from step_kernels.model.train.controls import RandomExit, RandomPolicy
from step_kernels.model.train.metrics import border_pixels
from step_kernels.model.train.smoke import SmokeSettings, smoke

HELD_OUT = Scenes(4, SIZE, 9)
TOLD = {"mean": INFO.mean, "std": INFO.std, "classes": INFO.classes}


def test_iou_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    confusion, pairs = Confusion(6), []
    for _ in range(3):
        labels, found = rng.integers(0, 5, (2, 2, 20, 30))  # nothing is of class 5
        labels[labels == 4] = 255
        confusion.add(torch.from_numpy(found), torch.from_numpy(labels))
        pairs.append((labels, found))
    labels, found = (np.concatenate(column).ravel() for column in zip(*pairs, strict=True))
    seen = labels != 255
    for number, iou in enumerate(confusion.iou().tolist()):
        both = ((labels == number) & (found == number)).sum()
        either = (((labels == number) | (found == number)) & seen).sum()
        assert iou == pytest.approx(both / either) if either else np.isnan(iou)
    told = confusion.summary(8.0)
    assert told["pixel_accuracy"] == pytest.approx(100 * (labels == found)[seen].mean(), abs=0.01)
    with pytest.raises(ValueError, match="labels: expected some below 6, or 255, got others"):
        confusion.add(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), 6))
    assert told["miou"] == pytest.approx(100 * float(confusion.iou().nanmean()), abs=0.01)


def test_borders_and_thin_classes_by_hand() -> None:
    labels = torch.zeros(1, 20, 40, dtype=torch.long)
    labels[:, :, 20:22] = 1
    near = border_pixels(labels, 3)
    assert near[0, 0].nonzero().flatten().tolist() == [*range(17, 25)]
    confusion = Confusion(2)
    confusion.add(torch.where(near, 0, labels), labels)
    assert confusion.thickness()[1] == 2 and confusion.summary(8.0)["thin_classes"] == ["1"]
    assert confusion.near_border.sum() == near.sum() and confusion.summary(8.0)["thin_miou"] == 0


@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_random_merging_takes_as_many_blocks_of_each_side(size: tuple[int, int]) -> None:
    images = torch.randn(3, 3, *size).cumsum(3).cumsum(2) / 50
    policy = VariancePolicy.calibrate(images, patch_size=PATCH, reduction=2)
    own, other = (each(images, patch_size=PATCH) for each in (policy, RandomPolicy(policy)))
    assert not own.equal(other) and torch.equal(own.cu_seqlens, other.cu_seqlens)
    for b in range(3):
        assert torch.equal(own.sides()[b].flatten().sort().values, other.sides()[b].flatten().sort().values)


def test_random_halting_halts_as_many_tokens_of_each_image() -> None:
    images, labels = items(3)
    segmenter = small_segmenter(OraclePolicy(labels), threshold=0.35)
    encoder, head = segmenter.encoder, segmenter.encoder.exit_heads()[1]
    own = segmenter.trace(images)
    random = StepSegmenter(StepEncoder(encoder.vit, encoder.policy, {1: RandomExit(head)}), segmenter.decoder)
    other = random.trace(images)
    assert own.stages[0].halted.any() and torch.equal(own.stages[0].layout.lengths(), other.stages[0].layout.lengths())
    assert not torch.equal(own.stages[0].halted, other.stages[0].halted)
    assert not other.stages[0].halted[other.layout.cu_seqlens[:-1].long()].any()  # CLS stays


def test_variants_differ_in_what_they_are_named_for() -> None:
    segmenter = small_segmenter(threshold=0.35)
    names = ("oracle", "merged + exits", "dense", "merged", "random merging", "random halting", "variance")
    found = evaluate(segmenter, HELD_OUT, names, batch=3, **TOLD)
    assert list(found) == [
        "dense",
        "merged",
        "merged + exits",
        "random merging",
        "random halting",
        "variance",
        "oracle",
    ]
    assert found["dense"]["reduction"] == 1 and found["dense"]["tokens"] == 64 and "agreement" not in found["dense"]
    assert found["merged"]["tokens"] == found["random merging"]["tokens"] == found["merged + exits"]["tokens"] < 64
    assert found["merged"]["halted"]["all"] == 0 < found["random halting"]["halted"]["1"]
    assert found["merged"]["gflops"] > found["merged + exits"]["gflops"]
    assert found["variance"]["reduction"] == pytest.approx(found["merged"]["reduction"], rel=0.1)
    pictures, labels = (torch.stack(column) for column in zip(*(HELD_OUT[i] for i in range(4)), strict=True))
    images = (pictures.float() / 255 - 0.5) / 0.25
    dense = StepSegmenter(StepEncoder(segmenter.encoder.vit), segmenter.decoder).predict(images)
    assert found["dense"]["pixel_accuracy"] == pytest.approx(100 * float((dense == labels).double().mean()), abs=0.01)
    merged = segmenter.predict(images)
    agreement = 100 * float((dense == merged).double().mean())
    assert found["merged + exits"]["agreement"] == pytest.approx(agreement, abs=0.01)
    json.dumps(found, allow_nan=False)


def test_flops_are_of_pictures_from_all_parts_of_the_data() -> None:
    """Frames of a film are in order: the first ones are alike."""
    segmenter = small_segmenter(VariancePolicy(0.1, (2, 4)), exits=())
    flat, busy = torch.full((3, SIZE, SIZE), 128, dtype=torch.uint8), HELD_OUT[0][0]
    film = [(picture, HELD_OUT[0][1]) for picture in (flat,) * 8 + (busy,) * 8]
    alone = [evaluate(segmenter, film[i : i + 1], ("merged",), **TOLD)["merged"]["gflops"] for i in (0, 8)]
    for batch in (1, 2):
        found = evaluate(segmenter, film, ("merged",), batch=batch, **TOLD)["merged"]
        assert alone[0] < alone[1] and found["gflops"] == pytest.approx(sum(alone) / 2, rel=2e-3)


def test_the_oracle_leaves_out_what_is_ignored() -> None:
    segmenter = small_segmenter(exits=())
    whole, without = (evaluate(segmenter, HELD_OUT, ("oracle",), ignore_index=label, **TOLD) for label in (255, 0))
    assert without["oracle"]["tokens"] < whole["oracle"]["tokens"]  # where sky meets the hills, blocks are of one class


def test_exits_without_a_policy_are_evaluated() -> None:
    segmenter, (images, _) = small_segmenter(None, threshold=0.35), items(4, seed=9)
    found = evaluate(segmenter, HELD_OUT, variants_of(segmenter), **TOLD)
    halted = 100 * int(segmenter.trace(images).stages[0].halted.sum()) / 256
    assert list(found) == ["dense", "merged + exits"] and found["merged + exits"]["reduction"] == 1
    assert found["merged + exits"]["halted"]["1"] == pytest.approx(halted, abs=0.01) and halted > 0


def test_windows_that_the_checkpoint_tells_are_what_is_evaluated_and_calibrated() -> None:
    """Labels, tokens and FLOPs of four crops a picture; thresholds on those crops; other views by name."""
    segmenter, (images, labels) = small_segmenter(threshold=0.35), items(4, seed=9)
    segmenter.info = replace(INFO, window=(40, 40), stride=(24, 24), enlarge=True)
    found = evaluate(segmenter, HELD_OUT, ("dense", "merged + exits", "oracle"), batch=2, **TOLD)
    assert found["dense"]["tokens"] == 4 * 25 and found["oracle"]["tokens"] < 100
    dense = StepSegmenter(StepEncoder(segmenter.encoder.vit), segmenter.decoder)
    accuracy = 100 * float((predict_windows(dense, images, 40, 24) == labels).double().mean())
    assert found["dense"]["pixel_accuracy"] == pytest.approx(accuracy, abs=0.01)
    crops = [images[:, :, y : y + 40, x : x + 40] for y in (0, 24) for x in (0, 24)]
    trace = segmenter.trace(torch.cat(crops))
    assert found["merged + exits"]["tokens"] == (trace.layout.num_tokens - 16) / 4
    assert found["merged + exits"]["halted"]["1"] == pytest.approx(
        100 * int(trace.stages[0].halted.sum()) / (trace.layout.num_tokens - 16), abs=0.01
    )
    small = evaluate(segmenter, HELD_OUT, ("dense",), views={"resize": 24, "mirror": True}, **TOLD)["dense"]
    assert small["tokens"] == 2 * 25  # enlarged to the window, and mirrored
    mirrored = predict_windows(dense, images, 40, 24, resize=24, mirror=True)
    assert (mirrored != predict_windows(dense, images, 40, 24)).float().mean() > 0
    with pytest.raises(ValueError, match="expected 'oracle' without scales and mirror"):
        evaluate(segmenter, HELD_OUT, ("oracle",), views={"mirror": True}, **TOLD)
    for views, tokens in ({}, 9), ({"resize": "own"}, 64):
        resized = small_segmenter(threshold=0.35)
        resized.info = replace(INFO, resize=(24, 80))
        assert evaluate(resized, HELD_OUT, ("dense",), views=views, **TOLD)["dense"]["tokens"] == tokens
    calibrate_policy(segmenter, [(images, labels)], reduction=1.5)
    tokens = segmenter.trace(torch.cat(crops)).layout.num_tokens - 16
    assert 400 / tokens == pytest.approx(1.5, rel=0.1)
    calibrate_policy(segmenter, [(images, labels)], purity=0.7)
    calibrate_exits(segmenter, lambda: [(images, labels)], halted=0.3)
    trace = segmenter.trace(torch.cat(crops))
    assert int(trace.stages[0].halted.sum()) / (trace.layout.num_tokens - 16) == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("policy", "exits", "names", "words"),
    [
        (None, (1,), ("merged",), "with a policy for the variant 'merged', got none"),
        ("net", (), ("merged + exits",), r"with exits for the variant 'merged \+ exits', got none"),
        ("net", (), ("best",), "variants: expected some of .*best"),
        ("net", (), ("variance",), "expected 'merged' beside 'variance'"),
    ],
)
def test_variants_that_cannot_be(policy: object, exits: tuple[int, ...], names: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(small_segmenter(policy, exits), HELD_OUT, names, **TOLD)


@pytest.mark.parametrize("reduction", [1.0, 1.5, 3.0])
def test_a_policy_calibrated_to_tokens_leaves_so_many(reduction: float) -> None:
    segmenter, (images, labels) = small_segmenter(exits=()), items(6)
    calibrate_policy(segmenter, [(images[:4], labels[:4]), (images[4:], None)], reduction=reduction)
    cells, tokens = 6 * 64, segmenter.trace(images).layout.capacity - 6
    assert cells / tokens == pytest.approx(reduction, rel=0.05)


def test_a_policy_calibrated_to_purity_takes_pure_blocks() -> None:
    segmenter, (images, labels) = small_segmenter(exits=()), items(6)
    thresholds = calibrate_policy(segmenter, [(images, labels)], purity=0.7)
    policy = segmenter.encoder.policy
    assert isinstance(policy, PolicyNet) and policy.thresholds.tolist() == pytest.approx(thresholds)
    for scores, pure, threshold in zip(
        policy.scores(images, patch_size=PATCH), block_purity(labels, (2, 4), patch_size=PATCH), thresholds, strict=True
    ):
        taken = scores > threshold
        assert not taken.any() or (pure[taken] == 1).float().mean() >= 0.7
        more = scores > threshold - 0.05  # a lower one that takes more is not pure enough, or takes all
        assert torch.equal(more, taken) or more.all() or (pure[more] == 1).float().mean() < 0.75
    scores = [torch.tensor([[[0.9, 0.9], [0.5, 0.2]]])] * 2  # of two, one of which is pure, both are taken or none
    pure = [torch.tensor([[[1, 0], [1, 1]]], dtype=torch.int8), torch.tensor([[[1, 1], [0, 0]]], dtype=torch.int8)]
    assert by_purity([(scores, pure, [2, 4], 64)], policy, 1.0) == pytest.approx([1.0, 0.7])
    with pytest.raises(ValueError, match="batches: expected labels, which purity needs, got none"):
        calibrate_policy(segmenter, [(images, None)], purity=0.7)


def test_exits_calibrated_to_a_share_and_to_points() -> None:
    images, labels = items(6)
    segmenter = small_segmenter(VariancePolicy(0.3), (1,))
    reads = lambda: [(images[:3], labels[:3]), (images[3:], labels[3:])]  # noqa: E731
    calibrate_exits(segmenter, reads, halted=0.4)
    trace = segmenter.trace(images)
    assert int(trace.stages[0].halted.sum()) / (trace.layout.capacity - 6) == pytest.approx(0.4, abs=0.05)
    head = segmenter.encoder.exit_heads()[1].head
    with torch.no_grad():
        head.weight *= 1e-2  # as on flat pictures: about equally sure of all
        calibrate_exits(segmenter, reads, halted=0.4)
        flat = segmenter.trace(images).stages[0].halted.sum()
        assert int(flat) / (trace.layout.capacity - 6) == pytest.approx(0.4, abs=0.01)
        head.weight *= 1e2
        head.weight *= 1e3  # so sure that probabilities round to 1
        assert calibrate_exits(segmenter, reads, halted=0.0) == 1.0
        head.weight /= 1e3
    strict = calibrate_exits(segmenter, reads, points=0.5)
    confusion = [Confusion(CLASSES), Confusion(CLASSES)]
    confusion[0].add(segmenter.predict(images), labels)
    segmenter.encoder.exit_heads()[1].threshold = 1.0
    confusion[1].add(segmenter.predict(images), labels)
    kept, full = (100 * float(each.iou().nanmean()) for each in confusion)
    assert full - kept <= 0.5 and strict < 1
    unlabelled = calibrate_exits(segmenter, lambda: [(images, None)], points=5.0)
    halting = segmenter.predict(images)
    segmenter.encoder.exit_heads()[1].threshold = 1.0
    assert (halting != segmenter.predict(images)).float().mean() <= 0.05 and unlabelled < 1


def test_calibration_that_cannot_be() -> None:
    with pytest.raises(TypeError, match="segmenter: expected one with a PolicyNet, got VariancePolicy"):
        calibrate_policy(small_segmenter(VariancePolicy(0.1)), [], reduction=2)
    with pytest.raises(ValueError, match="reduction: expected one of reduction and purity"):
        calibrate_policy(small_segmenter(), [], reduction=2, purity=0.9)
    with pytest.raises(ValueError, match="batches: expected at least one picture"):
        calibrate_policy(small_segmenter(), [], reduction=2)
    with pytest.raises(ValueError, match="segmenter: expected one with exits"):
        calibrate_exits(small_segmenter(exits=()), list, halted=0.3)


def test_the_whole_recipe_in_small(tmp_path: Path) -> None:
    """That it runs and writes; how good it gets takes minutes (bench/results/training/smoke.json)."""
    sizes = {"size": 48, "width": 32, "depth": 2, "exits": (1,), "scenes": 8, "held_out": 4, "epochs": 1, "tuning": 1}
    result = smoke(tmp_path, SmokeSettings(**sizes), tell=lambda text: None)
    assert json.loads((tmp_path / "smoke.json").read_text())["held out"] == result["held out"]
    assert set(result["held out"]) >= {"dense twin", "dense", "merged", "merged + exits", "random halting"}
    left, held_out = load_checkpoint(tmp_path / "merged"), Scenes(4, 48, 1)
    told = {"mean": left.info.mean, "std": left.info.std, "classes": Scenes.classes, "batch": 4}
    again = evaluate(left, held_out, ("merged + exits",), **told)["merged + exits"]
    wanted = result["held out"]["merged + exits"]
    assert {key: again[key] for key in ("miou", "halted")} == {key: wanted[key] for key in ("miou", "halted")}
