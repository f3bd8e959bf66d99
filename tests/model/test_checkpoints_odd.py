"""Configs beside and inside checkpoints with values that make no sense, or another network: refused, naming file and value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    draw,
    mmseg_config,
    mmseg_shapes,
    save_mmengine,
    save_segmenter,
    segmenter_shapes,
    variant,
    vit_shapes,
)
from small_models import small_segmenter

from step_kernels.model import CheckpointInfo, checkpoint_info, load_checkpoint, save_checkpoint


def refused(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    for read in (load_checkpoint, checkpoint_info):
        with pytest.raises(error, match=message) as caught:
            read(path)
        assert type(caught.value) is error and path.name in str(caught.value)


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    torch.save({**draw(vit_shapes()), 3: torch.ones(1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", r"expected tensors by name \(str\), got the keys int 3")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("image_size", "'512'", "img_size: expected a pair.*got str '512'"),
        ("image_size", "[32]", "img_size: expected a pair"),
        ("image_size", "32.0", "img_size: expected a pair.*got float 32.0"),
        ("n_heads", "'2'", "num_heads: expected an int, got str '2'"),
        ("normalization", "[1]", r"expected normalization in variant.yml to be vit or deit, got list \[1\]"),
        ("normalization", "clip", "expected normalization in variant.yml to be vit or deit, got str 'clip'"),
    ],
)
def test_odd_values_in_variants(entry: str, value: str, message: str, tmp_path: Path) -> None:
    text = variant("linear", **{} if entry == "normalization" else {entry: value})
    if entry == "normalization":
        text = text.replace("normalization: vit", f"normalization: {value}")
    refused(save_segmenter(tmp_path, "linear", text), message)


@pytest.mark.parametrize("schedule", ["5", "[5]", "many"])
def test_odd_schedules(schedule: str, tmp_path: Path) -> None:
    state = draw({**segmenter_shapes("linear"), "policy_net.x": (1,)})
    path = save_segmenter(tmp_path, "linear", variant("linear", policy_schedule=schedule), state)
    refused(path, "expected policy_schedule in variant.yml to be a pair of numbers, got")


def test_a_variant_without_normalization(tmp_path: Path) -> None:
    text = variant("linear").replace("  normalization: vit\n", "")
    assert checkpoint_info(save_segmenter(tmp_path, "linear", text)).mean is None


def mmseg(tmp_path: Path, old: str = "", new: str = "", decoder: str = "mask_transformer", **backbone: Any) -> Path:
    text = mmseg_config(**backbone)
    assert old in text
    return save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes(decoder)), text.replace(old, new) if old else text)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"img_size": "32"}, "img_size: expected a pair.*got str '32'"),
        ({"num_heads": "2"}, "num_heads: expected an int, got str '2'"),
        ({"num_layers": 4}, "backbone.num_layers: expected 4, .* got 3"),
        ({"embed_dims": 128}, "backbone.embed_dims: expected 128, .* got 64"),
        ({"patch_size": 16}, "backbone.patch_size: expected 16, .* got 8"),
    ],
)
def test_odd_and_other_sizes_in_mmseg_configs(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(mmseg(tmp_path, **entry), message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_layers=2", "num_layers=3", "decode_head.num_layers: expected 3, .* got 2"),
        ("num_layers=2", "embed_dims=128", "decode_head.embed_dims: expected 128, .* got 64"),
        ("num_layers=2", "num_classes=150", "decode_head.num_classes: expected 150, .* got 7"),
    ],
)
def test_other_sizes_of_mmseg_heads(old: str, new: str, message: str, tmp_path: Path) -> None:
    refused(mmseg(tmp_path, old, new), message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"out_indices": 1}, "expected a backbone with out_indices ending in -1 or 2, got out_indices=1"),
        ({"out_indices": (2, 1)}, r"out_indices ending in -1 or 2, got out_indices=\(2, 1\)"),
        ({"out_indices": "all"}, "out_indices ending in -1 or 2, got out_indices='all'"),
        ({"output_cls_token": True}, "expected a backbone with output_cls_token=False"),
        ({"norm_cfg": {"type": "BN"}}, "expected a backbone with norm_cfg of type 'LN', got 'BN'"),
    ],
)
def test_mmseg_backbones_that_compute_something_else(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(mmseg(tmp_path, **entry), message, NotImplementedError)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("in_index=0", "expected a decode_head with in_index=-1, got in_index=0"),
        ("norm_cfg=dict(type='BN')", "expected a decode_head with norm_cfg of type 'LN', got 'BN'"),
    ],
)
def test_mmseg_heads_that_compute_something_else(new: str, message: str, tmp_path: Path) -> None:
    refused(mmseg(tmp_path, "num_layers=2", new), message, NotImplementedError)


def test_mmseg_configs_that_tell_the_usual(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"num_layers": 3, "embed_dims": 64, "patch_size": 8, "output_cls_token": False}
    head = "num_layers=2, in_index=-1, embed_dims=64, num_classes=7, norm_cfg=dict(type='LN')"
    for outputs in (-1, 2, [2], (0, 1, 2)):
        load_checkpoint(mmseg(tmp_path, "num_layers=2", head, out_indices=outputs, **usual))
    # The linear head has no blocks and no norms for these to describe.
    load_checkpoint(mmseg(tmp_path, "num_layers=2", "num_layers=5, norm_cfg=dict(type='SyncBN')", "linear"))


@pytest.mark.parametrize("values", ["['a', 1, 2]", "[1, 2]", "[1, 2, 3, 4]", "5", "[True, 1, 2]", "[1, 2, 1e999]"])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_odd_normalisations(name: str, values: str, tmp_path: Path) -> None:
    path = mmseg(tmp_path, f"{name}=[127.5, 127.5, 127.5]", f"{name}={values}")
    refused(path, f"a.pth: expected {name} to be 3 finite.* numbers, one per channel, got")


@pytest.mark.parametrize("deviation", [0, -1])
def test_deviations_are_positive(deviation: int, tmp_path: Path) -> None:
    path = mmseg(tmp_path, "std=[127.5, 127.5, 127.5]", f"std=[1, 2, {deviation}]")
    refused(path, "expected std to be 3 finite, positive numbers")


def test_normalisation_in_a_file_of_ours(tmp_path: Path) -> None:
    model = small_segmenter(None)
    for values in ((0.5, 0.5), (0.5, 0.5, float("nan"))):
        with pytest.raises(ValueError, match="info: expected mean to be 3 finite numbers"):
            save_checkpoint(model, tmp_path, info=CheckpointInfo("any", mean=values))
    assert not list(tmp_path.iterdir())
    file = save_checkpoint(model, tmp_path, info=CheckpointInfo("any", std=(0.5, 0.25, 0.75)))
    config = tmp_path / "config.json"
    config.write_text(re.sub(r"0\.75", "0.0", config.read_text()))
    refused(file, "expected std to be 3 finite, positive numbers")
