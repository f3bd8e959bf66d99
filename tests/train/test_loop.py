"""The training loop: stages learn, runs resume, processes agree, failures are told and lose nothing."""

from __future__ import annotations

import csv
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_cases import AS_THEY_ARE, INFO, PATCH, SIZE, items, settings, small_segmenter

from step_kernels.model import CheckpointInfo, CosineExit, PolicyNet, StepSegmenter, load_checkpoint, save_checkpoint
from step_kernels.model.train import Objective, Recipe, Scenes, TrainSettings, merging_cost, merging_loss, train
from step_kernels.model.train.loop import STATE
from step_kernels.model.train.optimizer import Optimizer, cosine

DATA = Scenes(6, SIZE, 3)


@pytest.mark.parametrize("stage", ["heads", "policy", "exits", "all"])
def test_losses_fall_and_the_checkpoint_is_the_model(stage: str, tmp_path: Path) -> None:
    segmenter = small_segmenter()
    train(segmenter, DATA, settings(stage, epochs=3, lr=3e-3), tmp_path, info=INFO)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == list("123")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    read, (images, _) = load_checkpoint(tmp_path), items(1)
    assert read.info.classes == Scenes.classes and read.info.mean == INFO.mean
    assert not segmenter.training and torch.equal(read.predict(images), segmenter.predict(images))


def test_a_policy_with_a_tolerance_learns_costs_in_which_rare_classes_count_more(tmp_path: Path) -> None:
    segmenter = small_segmenter()
    images, labels = items(6, 3)  # all in one batch, of which batch norm takes the statistics
    told = train(segmenter, DATA, settings("policy", epochs=1, batch=6, lr=0.0, tolerance=0.1), tmp_path, info=INFO)
    share = torch.stack([(labels == number).float().mean() for number in range(len(Scenes.classes))])
    weights = torch.where(share > 0, share**-0.5, 0)
    weights = weights / (weights * share).sum()
    costs = merging_cost(labels, weights, (2, 4), patch_size=PATCH)
    logits = small_segmenter().encoder.policy.train().logits(images, patch_size=PATCH)
    torch.testing.assert_close(
        told["policy"], float(merging_loss(logits, costs, tolerance=0.1).detach()), rtol=1e-4, atol=0
    )
    with pytest.raises(ValueError, match="labels: expected some below 6, or 255, got 9"):
        wrong = [(picture, labels + 9 - labels.max()) for picture, labels in (DATA[0], DATA[1])]
        train(segmenter, wrong, settings("policy", tolerance=0.1), tmp_path / "wrong", info=INFO)


@pytest.mark.parametrize("named", [{}, {"ema": 0.9, "accumulate": 2, "layer_decay": 0.8}])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(named: dict, tmp_path: Path) -> None:
    recipe = Recipe(crop=(48, 48), scale=(0.8, 1.2))
    whole, halves = small_segmenter(), small_segmenter()
    given = settings("all", epochs=2, recipe=recipe, **named)
    train(whole, DATA, given, tmp_path / "whole", info=INFO)

    def stop(model: object) -> dict[str, float]:
        raise KeyboardInterrupt

    calls = iter([lambda model: {}, stop])
    with pytest.raises(KeyboardInterrupt):
        train(halves, DATA, given, tmp_path / "halves", info=INFO, evaluate=lambda model: next(calls)(model))
    again = small_segmenter(seed=5)
    train(again, DATA, given, tmp_path / "halves", info=INFO, resume=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    told = {"info": INFO, "resume": True}
    with pytest.raises(ValueError, match=r"resume: expected the settings of .*, lr 0.001, got others"):
        train(again, DATA, settings("all", recipe=recipe, lr=1e-2, **named), tmp_path / "halves", **told)
    with pytest.raises(ValueError, match=r"resume: expected the settings of .*, ignore_index 255, got others"):
        train(again, DATA, given, tmp_path / "halves", ignore_index=5, **told)
    with pytest.raises(ValueError, match=r"resume: expected the settings of .*, std \(.*\), got others"):
        train(again, DATA, given, tmp_path / "halves", info=replace(INFO, std=None), resume=True)
    with pytest.raises(ValueError, match=rf"resume: expected the settings of .*, pictures {len(DATA)}, got others"):
        train(again, Scenes(3, SIZE), given, tmp_path / "halves", **told)
    with pytest.raises(ValueError, match=r"resume: expected the settings of .*, dtype torch.float32, got others"):
        train(small_segmenter().bfloat16(), DATA, given, tmp_path / "halves", **told)
    with pytest.raises(ValueError, match=r"resume: expected the model of .*, got another one: Unexpected key"):
        train(small_segmenter(None), DATA, given, tmp_path / "halves", **told)
    state = (tmp_path / "halves" / STATE).read_bytes()
    for damaged in (b"", b"no state", state[: len(state) // 2]):
        (tmp_path / "halves" / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"halves/train.state: expected a file of torch.save, .* cannot be read"):
            train(again, DATA, given, tmp_path / "halves", **told)
    train(again, DATA, replace(given, epochs=1), tmp_path / "halves", info=INFO)
    assert (tmp_path / "halves/log.csv").read_text().count("\n") == 2  # another run, not rows behind the first one's


def test_features_of_a_frozen_backbone_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    features = Objective.features
    monkeypatch.setattr(Objective, "features", lambda self, images: calls.append(1) or features(self, images))
    kept, fresh = small_segmenter(), small_segmenter()
    train(kept, DATA, settings("exits", epochs=4, views=2), tmp_path / "kept", info=INFO)
    assert len(calls) == 2 * 3  # views times batches
    train(fresh, DATA, settings("exits", epochs=1, views=0), tmp_path / "fresh", info=INFO)
    assert len(calls) == 2 * 3 + 3
    train(
        small_segmenter(),
        [DATA[i] for i in range(3)],
        settings("exits", batch=4, epochs=1),
        tmp_path / "few",
        info=INFO,
    )
    assert len(calls) == 2 * 3 + 3 + 1  # some of three pictures twice, but no second batch
    once = small_segmenter()
    train(once, DATA, settings("exits", epochs=1, views=1), tmp_path / "once", info=INFO)
    # Kept in fp16, and their batches come in another order.
    torch.testing.assert_close(fresh.state_dict(), once.state_dict(), rtol=0.02, atol=5e-3)


def test_every_step_takes_the_mean_of_its_batches_the_last_of_an_epoch_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, step = list[float](), Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda *given: norms.append(step(*given)) or norms[-1])
    for accumulate in (1, 2):
        given = settings("all", epochs=1, lr=0.0, clip=0.0, accumulate=accumulate)
        train(small_segmenter(), DATA, given, tmp_path, info=INFO)
    assert len(norms) == 3 + 2 and norms[4] == pytest.approx(norms[2])


def test_averages_are_of_fp32_and_of_statistics_too(tmp_path: Path) -> None:
    segmenter, seen = small_segmenter().to(torch.bfloat16), []
    before = segmenter.decoder.head.weight.detach().clone()
    train(segmenter, DATA, settings("heads", epochs=1, ema=0.999), tmp_path, info=INFO)
    moved = (load_checkpoint(tmp_path).decoder.head.weight - before).abs()
    assert 0 < moved.max() < 1e-4  # less than bf16 can add to most weights
    segmenter = small_segmenter()

    def compare(average: StepSegmenter) -> dict[str, float]:
        seen.extend(model.encoder.policy.trunk[0][1].running_mean.clone() for model in (average, segmenter))
        return {}

    train(segmenter, DATA, settings("policy", epochs=1, ema=0.9), tmp_path, info=INFO, evaluate=compare)
    assert 0 < seen[0].abs().max() < seen[1].abs().max()


def test_weights_of_half_precision_keep_small_steps() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = Optimizer({"decoder.head.weight": weight}, 1e-4, 0.0, 1.0, depth=2)
    for _ in range(100):  # each below half of bf16's step at 1, which is 2^-8
        weight.grad = torch.ones_like(weight)
        optimizer.step(1.0, 0.0)
    torch.testing.assert_close(weight.float(), torch.full((4, 4), 0.99), rtol=0, atol=2**-9)


def test_rates_and_decay_by_depth() -> None:
    segmenter = small_segmenter()
    learned = Objective(segmenter, "all").learned()
    optimizer = Optimizer(learned, 1.0, 0.1, 0.5, depth=2)
    found = {
        id(p): (group["peak"], group["weight_decay"]) for group in optimizer.adamw.param_groups for p in group["params"]
    }
    by_name = {name: found[id(p)] for name, p in learned.items()}
    assert by_name["encoder.vit.pos_embed"] == (0.125, 0.0)
    assert by_name["encoder.vit.patch_embed.proj.weight"] == (0.125, 0.1)
    assert by_name["encoder.vit.blocks.0.mlp.fc1.weight"] == (0.25, 0.1)
    assert by_name["encoder.vit.blocks.1.norm1.weight"] == (0.5, 0.0)
    (group,) = Optimizer({"encoder.exits.1.scale": CosineExit(24, 6).scale}, 1.0, 0.1, 1.0, depth=2).adamw.param_groups
    assert group["weight_decay"] == 0
    assert by_name["decoder.head.weight"] == by_name["encoder.exits.1.head.weight"] == (1.0, 0.1)


def test_the_cosine_rises_and_falls() -> None:
    rates = [cosine(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1 and rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001 and cosine(0, 1, 0.05) == 1


def test_a_loss_that_is_not_finite_is_told_and_nothing_is_saved(tmp_path: Path) -> None:
    earlier = save_checkpoint(small_segmenter(seed=5), tmp_path, info=INFO).read_bytes()
    segmenter = small_segmenter()
    torch.nn.init.constant_(segmenter.decoder.head.bias, torch.nan)
    wanted = r"loss: expected a finite number, got nan in epoch 1, step 1 of 6, learning rate 0\.001"
    with pytest.raises(FloatingPointError, match=wanted):
        train(segmenter, DATA, settings("all"), tmp_path, info=INFO)
    segmenter = small_segmenter()
    segmenter.decoder.head.bias.register_hook(lambda grad: grad * torch.inf)  # as another process's would bring it
    with pytest.raises(
        FloatingPointError, match=r"gradients' norm: expected a finite number, got (nan|inf) in epoch 1"
    ):
        train(segmenter, DATA, settings("all"), tmp_path, info=INFO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == earlier


def test_a_disk_that_is_full_leaves_the_last_files(tmp_path: Path) -> None:
    segmenter = small_segmenter()
    train(segmenter, DATA, settings("heads", epochs=1), tmp_path, info=INFO)
    model, state = ((tmp_path / name).stat().st_size for name in ("model.safetensors", STATE))
    assert model < state
    before, limits = (tmp_path / STATE).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (model // 2, model + 100):  # too little for the one, and for the other
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                train(segmenter, DATA, settings("heads", epochs=1), tmp_path, info=INFO)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / STATE).read_bytes() == before and not list(tmp_path.glob(".*"))
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"stage": "both"}, "stage: expected one of"),
        ({"epochs": 0}, "epochs: expected an int at least 1"),
        ({"ema": 1.5}, "ema: expected a number"),
    ],
)
def test_settings_out_of_range(named: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainSettings(**{"stage": "all", "recipe": AS_THEY_ARE} | named)


@pytest.mark.parametrize("scale", [(1.0,), (1, 2, 3), (2, 1), (0, 1), (1, float("nan"))])
def test_scales_that_cannot_be(scale: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scale: expected two positive factors, the smaller one first"):
        Recipe(scale=scale)


def test_pictures_of_several_sizes_need_a_crop(tmp_path: Path) -> None:
    mixed = [Scenes(1, 64)[0], Scenes(1, 48)[0]]
    with pytest.raises(ValueError, match=re.escape("batch: expected pictures of one size, or a crop")):
        train(small_segmenter(), mixed, settings("all"), tmp_path / "a", info=INFO)
    crop = settings("all", epochs=1, recipe=Recipe(crop=(56, 56)))
    train(small_segmenter(), mixed, crop, tmp_path / "b", info=CheckpointInfo("none"))
    assert load_checkpoint(tmp_path / "b").info.mean == (0.5, 0.5, 0.5)
    picture, labels = DATA[0]
    with pytest.raises(ValueError, match="labels: expected some below 6, or 255, got 9"):
        train(small_segmenter(), [(picture, labels + 9)], settings("all", batch=1), tmp_path / "c", info=INFO)
    coarse = small_segmenter(PolicyNet((16,), width=4))
    with pytest.raises(ValueError, match=r"images: expected 128 pixels a side, .*, got 64 x 64"):
        train(coarse, DATA, settings("policy"), tmp_path / "c", info=INFO)
    alone = small_segmenter(PolicyNet((2, 8), width=4))
    with pytest.raises(ValueError, match=r"images: expected several of .* batch norm, got one picture of 64 x 64"):
        train(alone, DATA, settings("policy", batch=1), tmp_path / "c", info=INFO)
    with pytest.raises(ValueError, match="data: expected at least one labelled picture, got none"):
        train(small_segmenter(), [], settings("all"), tmp_path / "c", info=INFO)
