"""``torch.set_default_device`` is for tensors that say no device: with models and images on a CPU nothing changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_cases
from small_models import photographs, small_atm_segmenter, small_segmenter
from torch import Tensor

import step_kernels as sk
from step_kernels.model import (
    CheckpointInfo,
    OraclePolicy,
    PolicyNet,
    QuotaPolicy,
    StepEncoder,
    StepSegmenter,
    VariancePolicy,
    count_flops,
    load_segmenter,
    predict_windows,
    save_checkpoint,
)
from step_kernels.model.train import Recipe, Scenes, calibrate_exits, calibrate_policy, evaluate, loop, train
from step_kernels.model.train.evaluation import VARIANTS

SEGMENTERS: dict[str, Callable[[], StepSegmenter]] = {
    "linear exits, linear decoder": lambda: small_segmenter(keep_per_class=1),
    "cosine exits, mask transformer": lambda: small_segmenter("cosine", "mask_transformer"),
    "ATM": small_atm_segmenter,
}
POLICIES: dict[str, Callable[[], Any]] = {
    "variance": lambda: VariancePolicy(0.1),
    "net": lambda: PolicyNet((2, 4)).eval(),
    "net, deployed": lambda: PolicyNet((2, 4)).eval().deployed(),
    "quota": lambda: QuotaPolicy(VariancePolicy(0.1), 4),
    "oracle": lambda: OraclePolicy(torch.randint(3, (2, 64, 96)), sides=(2, 4)),
}
IMAGES, OTHER_SIZE = photographs(2, 64, 96), photographs(1, 80, 100)


def leaves(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]


def check_alike(run: Callable[[], Any]) -> None:
    """What ``run`` gives does not depend on the default device. On "meta" no stray tensor could hold a value."""
    expected = leaves(run())
    torch.set_default_device("meta")
    try:
        found = leaves(run())
    finally:
        torch.set_default_device(None)
    assert any(isinstance(one, Tensor) or one for one in expected)
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Tensor):
            assert other.device == one.device
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
        else:
            assert other == one or one != one


@pytest.mark.parametrize("name", SEGMENTERS)
@torch.no_grad()
def test_segmenters(name: str) -> None:
    segmenter = SEGMENTERS[name]()
    trace = segmenter.trace(IMAGES)
    assert trace.stages[0].halted.any()
    check_alike(lambda: [segmenter(IMAGES), segmenter.predict(IMAGES, static=True), segmenter.trace(IMAGES)])
    check_alike(lambda: [segmenter.predict(OTHER_SIZE), predict_windows(segmenter, OTHER_SIZE, 48, 32, max_crops=2)])
    check_alike(lambda: [segmenter.predict(IMAGES, replay=trace), trace.untrim().trim()])
    check_alike(lambda: [count_flops(segmenter, IMAGES.shape, trace).total, count_flops(segmenter, IMAGES.shape).total])


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_policies(name: str) -> None:
    policy = POLICIES[name]()
    check_alike(lambda: policy(IMAGES, patch_size=8, num_prefix=1))


def test_calibration_of_a_policy() -> None:
    for images, reduction in ((IMAGES, 2.0), ([OTHER_SIZE, IMAGES[0]], 2.0), (IMAGES[:, :, :8, :8], 1.0)):
        check_alike(lambda given=(images, reduction): [
            VariancePolicy.calibrate(given[0], reduction=given[1], patch_size=8).threshold
        ])  # fmt: skip


def test_layouts_and_decisions() -> None:
    sides = torch.ones(2, 8, 8, dtype=torch.int32)
    sides[0, :, :4] = 4
    scores, ones = torch.rand(2 * 65, 3), torch.ones(2, 4, 4)

    def run() -> list[Any]:
        layout = sk.SupertokenLayout.from_sides(sides, num_prefix=1)
        trimmed = layout.trim()
        trimmed.validate()
        halting = sk.halt_tokens(scores, layout, 0.6, activation=None)
        resolved = sk.resolve_layout([ones], sides=[2], thresholds=0.5, grid=(8, 8))
        schedule = sk.attention_schedule(trimmed)
        return [trimmed, halting, resolved, schedule, trimmed.log_sizes(), trimmed.lengths(), trimmed == layout.trim()]

    check_alike(run)


def test_bytes_with_statistics() -> None:
    images, layout = torch.randint(256, (2, 3, 16, 16)).byte(), sk.SupertokenLayout.uniform(2, (4, 4))
    check_alike(lambda: sk.merge_patches(images, layout, 4, mean=(0.5,) * 3, std=(0.25,) * 3))


def test_files_and_thresholds(tmp_path: Path) -> None:
    segmenter = small_segmenter()

    def run() -> list[Any]:
        segmenter.encoder.policy.threshold, segmenter.encoder.exit_heads()[1].threshold = 0.2, 0.5
        file = save_checkpoint(segmenter, tmp_path, info=CheckpointInfo("any", mean=(0.5,) * 3, std=(0.5,) * 3))
        loaded = load_segmenter(file)
        return [*loaded.state_dict().values(), repr(loaded), loaded.predict(IMAGES)]

    check_alike(run)


@pytest.mark.parametrize("family", ["AugReg", "DINOv3"])
@torch.no_grad()
def test_from_timm(family: str) -> None:
    """Verification included, in which timm itself makes tensors on the default device."""
    cases = pytest.importorskip("timm_models", reason="needs timm")
    model = cases.build(family, torch.float32)
    images = cases.pictures(model)
    check_alike(lambda: StepEncoder.from_timm(model).forward_features(images))


class Loader:
    """PyTorch's own draws a seed on the default device and reads it, which "meta" cannot give."""

    def __init__(
        self, data: Any, batch_sampler: list[list[int]], num_workers: int, collate_fn: Callable[..., Any]
    ) -> None:
        self.data, self.batches, self.collated = data, batch_sampler, collate_fn

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return (self.collated([self.data[i] for i in batch]) for batch in self.batches)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="AdamW counted its steps on the default device")
@pytest.mark.parametrize("stage", ["policy", "heads", "all"])
def test_training(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "DataLoader", Loader)
    fresh = train_cases.small_segmenter()

    def run() -> list[Tensor]:
        segmenter = copy.deepcopy(fresh)
        how = {"recipe": Recipe(crop=(64, 64)), "epochs": 1}
        train(segmenter, Scenes(4, 64, 1), train_cases.settings(stage, **how), tmp_path, info=train_cases.INFO)
        return list(segmenter.state_dict().values())

    check_alike(run)


def test_evaluation_and_thresholds() -> None:
    segmenter, (images, labels) = train_cases.small_segmenter().eval(), train_cases.items()

    def figures() -> list[str]:
        found = evaluate(segmenter, Scenes(2, 64, 1), VARIANTS, mean=(0.5,) * 3, std=(0.25,) * 3)
        return [repr(told | {"images_per_second": 0}) for told in found.values()]

    check_alike(figures)
    for wanted in ({"reduction": 1.5}, {"purity": 0.9}):
        check_alike(lambda wanted=wanted: calibrate_policy(segmenter, [(images, labels)], **wanted))
    check_alike(lambda: calibrate_exits(segmenter, lambda: [(images, labels)], halted=0.3))
