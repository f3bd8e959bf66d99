"""The training config inside mmsegmentation's files, which is searched and not read: one of another network is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_cases import HEADS, draw, mmseg_config, mmseg_shapes, refused, save_mmengine

from step_kernels.model import load_checkpoint

STATE = draw(mmseg_shapes("mask_transformer"))
LAST = "num_layers=2, type"  # of the decoder


@pytest.mark.parametrize(
    "setting",
    [
        "img_size=(16, 64)",
        "img_size=16",
        "num_heads=5",
        "interpolate_mode='bilinear'",
        "with_cls_token=False",
        "output_cls_token=True",
        "out_indices=1",
        "out_indices=(2, 1)",
        "out_indices='all'",
        "norm_cfg=dict(type='LN')",
        "norm_cfg=dict(eps=0.1, type='LN')",
        "act_cfg=dict(type='ReLU')",
        "num_fcs=3",
        "in_index=0",
        "align_corners=True",
    ],
)
def test_other_settings_are_named(setting: str, tmp_path: Path) -> None:
    text = mmseg_config().replace(LAST, f"{setting}, {LAST}")
    path = save_mmengine(tmp_path / "a.pth", STATE, text)
    refused(
        path,
        rf"own of Segmenter, with num_heads=2 and img_size=\(32, 32\), got {escape(setting.replace(' ', ''))}$",
        num_heads=HEADS,
    )


def escape(text: str) -> str:
    return text.replace("(", r"\(").replace(")", r"\)").replace(".", r"\.")


def test_the_usual_settings_load(tmp_path: Path) -> None:
    for setting in (
        "num_heads=2, act_cfg=dict(type='GELU'), num_fcs=2, in_index=-1, align_corners=False, output_cls_token=False",
        "out_indices=-1, img_size=32",
        "img_size=(\n  32,\n  32,\n)",
        "out_indices=2",
        "out_indices=[2]",
        "out_indices=(\n  0, 1, 2,\n)",
        "out_indices=(2,), norm_cfg=dict(requires_grad=True, type='SyncBN')",  # of a part that has no norms
    ):
        text = mmseg_config().replace(LAST, f"{setting}, {LAST}")
        load_checkpoint(save_mmengine(tmp_path / "a.pth", STATE, text), num_heads=HEADS)


def test_heads_are_asked_for_and_nothing_is_run(tmp_path: Path) -> None:
    for text in (None, mmseg_config(), "model = (", "model = dict(backbone=__import__('os').abort())"):
        path = save_mmengine(tmp_path / "a.pth", STATE, text)
        refused(path, "num_heads: expected the number of attention heads")
        assert load_checkpoint(path, num_heads=HEADS).encoder.vit.config.eps == 1e-6
