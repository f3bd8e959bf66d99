"""The training config inside mmsegmentation's files: one that tells of another network is refused, by the setting's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_cases import HEADS, draw, mmseg_config, mmseg_shapes, refused, save_mmengine

from step_kernels.model import load_checkpoint

BACKBONES = [
    ({"img_size": "32"}, "img_size: expected a pair.*got str '32'"),
    ({"num_heads": 5}, "num_heads: expected 5, as the config of .* tells, got 2"),
    ({"num_layers": 4}, "num_layers=3, got 4"),
    ({"embed_dims": 128}, "embed_dims=64, got 128"),
    ({"patch_size": 16}, "patch_size=8, got 16"),
    ({"out_indices": 1}, "out_indices=-1, got 1"),
    ({"out_indices": (2, 1)}, r"out_indices=-1, got \(2, 1\)"),
    ({"out_indices": "all"}, "out_indices=-1, got 'all'"),
    ({"output_cls_token": True}, "output_cls_token=False, got True"),
    ({"norm_cfg": {"type": "BN"}}, "norm_cfg.type='LN', got 'BN'"),
    ({"act_cfg": {"type": "ReLU"}}, "act_cfg.type='GELU', got 'ReLU'"),
    ({"num_fcs": 3}, "num_fcs=2, got 3"),
]
HEADS_OF_MMSEG = [
    ("num_layers=3", "num_layers=2, got 3"),
    ("embed_dims=128", "embed_dims=64, got 128"),
    ("num_classes=150", "num_classes=7, got 150"),
    ("in_index=0", "in_index=-1, got 0"),
    ("align_corners=True", "align_corners=False, got True"),
    ("norm_cfg=dict(type='BN')", "norm_cfg.type='LN', got 'BN'"),
    ("norm_cfg=dict(type='LN', eps=0.1)", "norm_cfg.eps=1e-05, got 0.1"),
]


def test_training_configs_of_other_models(tmp_path: Path) -> None:
    state = draw(mmseg_shapes("mask_transformer"))
    for entry, message in BACKBONES:
        told = "(its training config to tell model.backbone.)?"
        refused(save_mmengine(tmp_path / "a.pth", state, mmseg_config(**entry)), told + message, num_heads=2)
    for entry, message in HEADS_OF_MMSEG:
        text = mmseg_config().replace("num_layers=2", entry)
        refused(
            save_mmengine(tmp_path / "a.pth", state, text), f"its training config to tell model.decode_head.{message}"
        )
    # Text that is no config counts as none; nothing in it is run.
    for text in ("model = (", "model = dict(backbone=__import__('os').abort())", "model = dict(backbone=3)"):
        path = save_mmengine(tmp_path / "a.pth", state, text)
        refused(path, "num_heads: expected the number")
        assert load_checkpoint(path, num_heads=HEADS).encoder.vit.config.eps == 1e-6


def test_training_configs_that_tell_the_usual(tmp_path: Path) -> None:
    usual = {"num_layers": 3, "embed_dims": 64, "patch_size": 8, "output_cls_token": False}
    head = "num_layers=2, in_index=-1, embed_dims=64, num_classes=7, norm_cfg=dict(type='LN')"
    for outputs in (-1, 2, [2], (0, 1, 2)):
        text = mmseg_config(out_indices=outputs, **usual).replace("num_layers=2", head)
        load_checkpoint(save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("mask_transformer")), text))
    # The linear head has no blocks and no norms for these to describe.
    text = mmseg_config().replace("num_layers=2", "num_layers=5, norm_cfg=dict(type='SyncBN')")
    load_checkpoint(save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("linear")), text))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_odd_normalisations(name: str, tmp_path: Path) -> None:
    state, good = draw(mmseg_shapes("linear")), f"{name}=[127.5, 127.5, 127.5]"
    bad = ["['a', 1, 2]", "[1, 2]", "[1, 2, 3, 4]", "5", "[True, 1, 2]", "[1, 2, 1e999]"]
    for values in [*bad, *(["[1, 2, 0]", "[1, 2, -1]"] if name == "std" else [])]:
        path = save_mmengine(tmp_path / "a.pth", state, mmseg_config().replace(good, f"{name}={values}"))
        refused(path, f"a.pth: expected {name} to be 3 finite.* numbers, one per channel, got")
