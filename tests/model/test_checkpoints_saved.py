"""save_checkpoint and back: equal outputs, equal decisions, and refusals instead of models that would come back different."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_cases import (
    HEADS,
    INFO,
    MODELS,
    changed_config,
    draw,
    mmseg_config,
    mmseg_shapes,
    policy_net,
    save_mmengine,
    save_segmenter,
    variant,
    vit_shapes,
)
from small_models import photographs, small_segmenter, small_vit
from torch import nn

from step_kernels.model import (
    CheckpointInfo,
    LinearDecoder,
    LinearExit,
    MaskTransformerDecoder,
    OraclePolicy,
    QuotaPolicy,
    StepEncoder,
    StepSegmenter,
    VariancePolicy,
    checkpoint_info,
    load_checkpoint,
    load_encoder,
    load_segmenter,
    save_checkpoint,
)

IMAGES = photographs(2, 64, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_decisions_come_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[name]().to(dtype)
    if isinstance(model, StepEncoder):
        model.resample = "bilinear"
    file = save_checkpoint(model, tmp_path / "new" / "folder", info=INFO)
    assert file == tmp_path / "new" / "folder" / "model.safetensors"
    assert sorted(os.listdir(file.parent)) == ["config.json", "model.safetensors"]
    model.eval()
    of_kind, of_other = (load_encoder, load_segmenter)[:: 1 if isinstance(model, StepEncoder) else -1]
    again = load_checkpoint(file)
    for one in (again, load_checkpoint(file.parent), of_kind(str(file))):
        assert type(one) is type(model) and not one.training
        torch.testing.assert_close(one.state_dict(), model.state_dict(), rtol=0, atol=0)
    for path in (file, file.parent, str(file)):
        with pytest.raises(
            TypeError, match=rf"{path}: expected .*, got a step-kernels checkpoint with.* decoder, which load_"
        ):
            of_other(path)
    pictures = IMAGES.to(dtype)
    with torch.no_grad():
        ours, theirs = again(pictures), model(pictures)
    if isinstance(model, StepEncoder):
        assert torch.equal(ours.tokens, theirs.tokens) and again.resample == "bilinear"
        return
    assert torch.equal(ours, theirs)
    assert torch.equal(again.predict(pictures), model.predict(pictures))
    before, after = model.trace(pictures), again.trace(pictures)
    assert torch.equal(before.layout.cells, after.layout.cells)
    for stage, own in zip(before.stages, after.stages, strict=True):
        assert stage.block == own.block and torch.equal(stage.halted, own.halted)


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    again = load_checkpoint(save_checkpoint(MODELS["mask transformer"](), tmp_path, info=INFO)).train()
    again(IMAGES).square().mean().backward()
    lacking = [name for name, parameter in again.named_parameters() if parameter.grad is None]
    assert not lacking


def test_other_peoples_models_come_back(tmp_path: Path) -> None:
    """With what they are told by: epsilons, the rule for positions, normalisation and palette."""
    path = save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("mask_transformer")), mmseg_config())
    model, info = (read(path, num_heads=HEADS, img_size=(32, 32)) for read in (load_checkpoint, checkpoint_info))
    info = replace(info, std=(0.5, 0.25, 0.5), resize=(512, 2048))
    file = save_checkpoint(model, tmp_path / "copy.safetensors", info=info)
    assert (tmp_path / "copy.json").exists()
    again, told = load_checkpoint(file), checkpoint_info(file)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert told == replace(info, format="step-kernels", ignored=()) and told.window == (512, 512) and told.stretch
    assert info.palette is not None


def test_a_loaded_model_keeps_what_its_file_tells(tmp_path: Path) -> None:
    """Through another policy and two saves: the same normalisation, so the same labels."""
    path = save_segmenter(
        tmp_path / "a", "linear", changed_config(variant("linear"), "normalization", "normalization: deit")
    )
    model = load_checkpoint(path)
    assert model.info == checkpoint_info(path) and model.info.mean == (0.485, 0.456, 0.406)
    first = model.with_policy(VariancePolicy(0.3))
    second = load_checkpoint(save_checkpoint(first, tmp_path / "b"))
    third = load_checkpoint(save_checkpoint(second.with_policy(VariancePolicy(0.3)), tmp_path / "c"))
    for again in (second, third):
        assert again.info == replace(model.info, format="step-kernels", ignored=())
        assert again.encoder.vit.config == model.encoder.vit.config
        assert torch.equal(again.predict(normalised(again.info)), first.predict(normalised(model.info)))


def normalised(info: CheckpointInfo) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (info.mean, info.std))
    return (IMAGES.sigmoid() - mean) / std


@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
def test_a_save_without_normalisation_is_refused(tmp_path: Path) -> None:
    """A model that was built, and one whose file tells none; said to be unknown, it is saved."""
    path = save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("linear")), None)
    loaded = load_checkpoint(path, num_heads=HEADS, img_size=(32, 32))
    for model in (small_segmenter(None), loaded, loaded.with_policy(VariancePolicy(0.1))):
        with pytest.raises(ValueError, match=r"^info: expected a CheckpointInfo with mean and std, .* got None"):
            save_checkpoint(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert load_checkpoint(save_checkpoint(loaded, tmp_path / "out", info=loaded.info)).info.classes == ("sky", "sea")


def test_shared_parameters_are_saved(tmp_path: Path) -> None:
    """safetensors alone refuses tensors that share memory."""
    model = MODELS["linear"]()
    model.encoder.vit.blocks[0].attn.proj = model.encoder.vit.blocks[1].attn.proj
    with torch.no_grad():
        assert torch.equal(load_checkpoint(save_checkpoint(model, tmp_path, info=INFO))(IMAGES), model(IMAGES))


class OtherPolicy(VariancePolicy):
    pass


class OtherDecoder(LinearDecoder):
    pass


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: StepEncoder(small_vit(), OtherPolicy(0.1)),
            "policy: expected one of .*VariancePolicy.*, got OtherPolicy",
        ),
        (lambda: StepEncoder(small_vit(), QuotaPolicy(OtherPolicy(0.1), 1)), "policy: .*got OtherPolicy"),
        (lambda: StepEncoder(small_vit(), OraclePolicy(torch.zeros(1, 8, 8, dtype=torch.uint8))), "got OraclePolicy"),
        (lambda: StepSegmenter(StepEncoder(small_vit()), OtherDecoder(48, 5)), "decoder: expected .*got OtherDecoder"),
    ],
)
def test_parts_without_a_description_are_refused(build, message: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=message):
        save_checkpoint(build(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_would_come_back_different_are_refused(tmp_path: Path) -> None:
    changed = MODELS["linear"]()
    changed.encoder.vit.blocks[1].norm2.eps = 1e-3
    with pytest.raises(ValueError, match=r"model: expected encoder.vit.blocks.1.norm2.eps .*1e-06.*got 0.001"):
        save_checkpoint(changed, tmp_path)
    folded = StepEncoder(small_vit(), policy_net().eval().deployed())
    with pytest.raises(ValueError, match=r"policy.trunk.0.0.bias .*absent.*got shape \[8\].* deployed copy"):
        save_checkpoint(folded, tmp_path)
    thinner = StepSegmenter(StepEncoder(small_vit()), MaskTransformerDecoder(48, 5))
    thinner.decoder.blocks[1].mlp.fc1 = nn.Linear(48, 50)
    with pytest.raises(ValueError, match=r"decoder.blocks.1.mlp.fc1.weight .*\[192, 48\].*got shape \[50, 48\]"):
        save_checkpoint(thinner, tmp_path)
    heads = MODELS["mask transformer"]()
    heads.decoder.blocks[1].attn.num_heads = 6
    with pytest.raises(ValueError, match=r"decoder.blocks.1.attn.num_heads"):
        save_checkpoint(heads, tmp_path)
    assert not list(tmp_path.iterdir())


def test_normalisation_is_checked_on_both_ways(tmp_path: Path) -> None:
    model = small_segmenter(None)
    uint8 = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # mmsegmentation's
    for values in (
        ("a", 1, 0),
        (0.5, 0.5),
        (0, 0, 1, 1),
        5,
        (True, 1, 0),
        (0.5, 0.5, float("nan")),
        (0, 0, -1),
        uint8[0],
    ):
        wanted = r"info: expected mean to be 3 numbers in \[0, 1\], one per channel \(divide those of uint8 pictures by 255\), got"
        with pytest.raises(ValueError, match=wanted):
            save_checkpoint(model, tmp_path, info=CheckpointInfo("any", mean=values))
    for values in ((1, 0.5, -1), (1, 1, 0), uint8[1]):
        wanted = r"expected std to be 3 positive numbers up to 1, one per channel \(divide those of uint8 pictures by 255\), got"
        with pytest.raises(ValueError, match=wanted):
            save_checkpoint(model, tmp_path, info=CheckpointInfo("any", std=values))
    assert not list(tmp_path.iterdir())
    file = save_checkpoint(model, tmp_path, info=CheckpointInfo("any", std=(0.5, 0.25, 0.75)))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("0.75", "0.0"))
    with pytest.raises(ValueError, match=r"model.safetensors: expected std to be 3 positive numbers up to 1"):
        load_checkpoint(file)


def test_thresholds_without_a_meaning_are_named(tmp_path: Path) -> None:
    file = save_checkpoint(small_segmenter(), tmp_path, info=INFO)
    tensors = safetensors.torch.load_file(file)
    for name, wrong in (("encoder.exits.1.threshold", 95.0), ("encoder.policy.threshold", float("nan"))):
        safetensors.torch.save_file(tensors | {name: torch.tensor(wrong)}, file)
        with pytest.raises(ValueError, match=f"{name}: expected a number of at (most 1|least 0), got"):
            load_checkpoint(file)


def test_bad_arguments_of_save(tmp_path: Path) -> None:
    model = MODELS["encoder"]()
    (tmp_path / "file").write_text("")
    for bad, error, message in (
        (tmp_path / "a.pth", ValueError, r"path: expected a folder or a file named \*.safetensors, got .*a.pth"),
        (tmp_path / "file", ValueError, r"path: expected a folder or a file named"),
        (3, TypeError, "path: expected a str or a path, got int 3"),
    ):
        with pytest.raises(error, match=message):
            save_checkpoint(model, bad, info=INFO)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a StepSegmenter or StepEncoder, got ViT"):
        save_checkpoint(model.vit, tmp_path)
    with pytest.raises(TypeError, match="info: expected a CheckpointInfo or None, got dict"):
        save_checkpoint(model, tmp_path, info={})  # type: ignore[arg-type]


def test_an_interrupted_save_keeps_the_old_files(tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(MODELS["encoder"](), tmp_path, info=INFO)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save", fails)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(StepEncoder(small_vit(), None, {1: LinearExit(48, 3)}), tmp_path, info=INFO)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


def test_without_safetensors_pickles_still_load(tmp_path: Path, monkeypatch) -> None:
    torch.save(draw(vit_shapes()), tmp_path / "vit.pth")
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    encoder = load_checkpoint(tmp_path / "vit.pth", num_heads=HEADS)
    with pytest.raises(ImportError, match=r"safetensors is needed .*pip install -e '\.\[checkpoints\]'"):
        save_checkpoint(encoder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
