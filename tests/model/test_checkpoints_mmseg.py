"""load_checkpoint on what mmsegmentation and DToP save: their training config is read as literals, and every rule in it is obeyed or
refused by name; each against the original's rule, written again in plain PyTorch."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_cases import (
    GRID,
    HEADS,
    PATCH,
    draw,
    dtop_shapes,
    mmseg_config,
    mmseg_shapes,
    newer_pipeline,
    older_pipeline,
    refused,
    save_mmengine,
    training_config,
)
from checkpoint_forwards import dtop_predictions, mmseg_logits
from torch import Tensor

from step_kernels.model import StepSegmenter, load_segmenter, predict_windows, save_checkpoint
from step_kernels.model.checkpoints.mmseg import literals

SIZES = {"heads": HEADS, "patch": PATCH, "grid": GRID}


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def state_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in draw(shapes).items()}


def loaded(folder: Path, state: dict[str, Tensor], config: str | None, **hints: Any) -> StepSegmenter:
    return load_segmenter(save_mmengine(folder / "iter_160000.pth", state, config), **hints)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
@pytest.mark.parametrize(
    ("config", "forward"),
    [
        ({}, {}),
        ({"backbone__img_size": 32, "data_preprocessor__type": "mmseg.models.SegDataPreProcessor"}, {}),
        ({"backbone__interpolate_mode": "bilinear"}, {"mode": "bilinear"}),
        ({"backbone__with_cls_token": False}, {"with_cls_token": False}),
        ({"backbone__num_heads": 4}, {"heads": 4, "head_heads": 2}),
        ({"backbone__norm_cfg": {"type": "LN"}}, {"eps": 1e-5}),
        ({"backbone__final_norm": None}, {"final_norm": False}),
    ],
    ids=[
        "as published",
        "words of other kinds",
        "bilinear positions",
        "no class token",
        "heads",
        "eps",
        "no final norm",
    ],
)
def test_the_network_is_the_configs(
    decoder: str, config: dict[str, Any], forward: dict[str, Any], tmp_path: Path
) -> None:
    state = state_of(mmseg_shapes(decoder))
    if forward.get("final_norm") is False:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.ln1")}
    segmenter = loaded(tmp_path, state, training_config(**config))
    for size in [(32, 32), (37, 61)]:
        close(segmenter(images(*size)), mmseg_logits(state, images(*size), **(SIZES | forward)))
    again = load_segmenter(save_checkpoint(segmenter, tmp_path / "own"))
    assert torch.equal(again(images(40, 24)), segmenter(images(40, 24))) and again.info.stretch


@torch.no_grad()
def test_a_missing_patch_bias_is_zero(tmp_path: Path) -> None:
    """mmsegmentation >= 1.2 trains without one."""
    state = state_of(mmseg_shapes("mask_transformer"))
    del state["backbone.patch_embed.projection.bias"]
    segmenter = loaded(tmp_path, state, mmseg_config())
    close(segmenter(images(32, 48)), mmseg_logits(state, images(32, 48), **SIZES))


@torch.no_grad()
def test_without_a_config_what_is_assumed_is_warned_of(tmp_path: Path) -> None:
    state = state_of(mmseg_shapes("linear"))
    with pytest.warns(
        UserWarning,
        match="iter_160000.pth: neither tensors nor a config tell, .*: class token on, GELU, .*64",
    ):
        segmenter = loaded(tmp_path, state, None, num_heads=HEADS)
    close(segmenter(images(32, 48)), mmseg_logits(state, images(32, 48), **SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(tmp_path, state, mmseg_config())


def test_hints_that_contradict_the_config(tmp_path: Path) -> None:
    path = save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("linear")), mmseg_config())
    refused(path, "num_heads: expected 2, as the config of .* tells, got 4", num_heads=4)
    refused(path, r"img_size: expected \(32, 32\), as the config of .* tells, got \(16, 64\)", img_size=(16, 64))


UNKNOWN = {
    "backbone__type": ("BEiT", "backbone.type .* to be 'VisionTransformer' or 'ViT_prune', got 'BEiT'"),
    "backbone__act_cfg": ({"type": "ReLU"}, "backbone.act_cfg.type .* to be 'GELU', got 'ReLU'"),
    "backbone__interpolate_mode": ("nearest", "backbone.interpolate_mode .*got 'nearest'"),
    "backbone__out_indices": ([1, 0], "backbone.out_indices .* to be -1 or 2, got 0"),
    "decode_head__type": ("UPerHead", "decode_head.type .*got 'UPerHead'"),
    "decode_head__align_corners": (True, "decode_head.align_corners"),
    "decode_head__act_cfg": ({"type": "ReLU"}, "decode_head.act_cfg.type"),
    "decode_head__norm_cfg": ({"type": "LN", "eps": 1e-6}, "decode_head.norm_cfg.eps .* to be 1e-05, got 1e-06"),
    "data_preprocessor__test_cfg": ({"size_divisor": 32}, "data_preprocessor.test_cfg"),
    "test_cfg__mode": ("tiles", "test_cfg.mode .* to be 'whole' or 'slide', got 'tiles'"),
    "backbone__img_size": ((64, 64), r"img_size: expected .* of 16 patches of 8 x 8, .*got \(64, 64\)"),
    "test_cfg__crop_size": ([512], r"expected window to be \(height, width\) in pixels, got list"),
    "test_cfg__stride": ((0, 480), "expected stride to be .* in pixels, got tuple"),
    "backbone__num_layers": ("many", "training config"),
    "decode_head__in_index": (7, "training config"),
}


@pytest.mark.parametrize("path", UNKNOWN)
def test_what_is_not_computed_is_refused_by_name(path: str, tmp_path: Path) -> None:
    value, message = UNKNOWN[path]
    config = training_config(**{path: value})
    refused(save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("mask_transformer")), config), message)


@torch.no_grad()
def test_bgr_is_turned_in_the_patch_embedding(tmp_path: Path) -> None:
    """mmcv reads pictures as BGR; ``bgr_to_rgb=False`` leaves them so, and mean and std are in that order, too."""
    state, mean, std = state_of(mmseg_shapes("linear")), [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
    segmenter = loaded(tmp_path, state, training_config(data_preprocessor={"mean": mean, "std": std}))
    rgb = torch.randint(0, 256, (2, 3, 40, 48), generator=torch.Generator().manual_seed(0)).double()
    ours = (rgb / 255 - column(segmenter.info.mean)) / column(segmenter.info.std)
    bgr = (rgb[:, [2, 1, 0]] - column(mean)) / column(std)
    close(segmenter(ours), mmseg_logits(state, bgr, **SIZES))
    assert segmenter.info.notes == ("its order BGR became RGB in the patch embedding",)


def column(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


@torch.no_grad()
def test_without_mean_pixels_are_raw(tmp_path: Path) -> None:
    state = state_of(mmseg_shapes("linear"))
    segmenter = loaded(tmp_path, state, training_config(data_preprocessor={"bgr_to_rgb": True, "size": [512, 512]}))
    raw = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).double()
    ours = (raw / 255 - column(segmenter.info.mean)) / column(segmenter.info.std)
    close(segmenter(ours), mmseg_logits(state, raw, **SIZES))


@pytest.mark.parametrize("to_rgb", [True, False])
def test_normalisation_of_the_older_mmsegmentation(to_rgb: bool, tmp_path: Path) -> None:
    older = f"img_norm_cfg = dict(mean=[1, 2, 3], std=[51, 102, 255], to_rgb={to_rgb})\n"
    info = loaded(tmp_path, draw(mmseg_shapes("linear")), older + training_config(data_preprocessor=None)).info
    order = slice(None, None, 1 if to_rgb else -1)
    assert info.mean == (1 / 255, 2 / 255, 3 / 255)[order] and info.std == (0.2, 0.4, 1.0)[order]
    info = loaded(tmp_path, draw(mmseg_shapes("linear")), training_config(data_preprocessor=None)).info
    assert info.mean is info.std is None


@torch.no_grad()
@pytest.mark.parametrize(("threshold", "used"), [(None, 0.3), (0.62, 0.62)])
def test_one_sigmoid_output_is_thresholded(threshold: float | None, used: float, tmp_path: Path) -> None:
    """EncoderDecoder's post-processing for out_channels=1, after the upsampling."""
    state = state_of(mmseg_shapes("linear", classes=1))
    head = {"type": "FCNHead", "out_channels": 1, "num_classes": 2, "threshold": threshold}
    config, pictures = training_config(decode_head=head, test_cfg={"mode": "whole"}), images(45, 61)
    state["decode_head.conv_seg.bias"] += math.log(used / (1 - used)) - mmseg_logits(state, pictures, **SIZES).mean()
    segmenter = loaded(tmp_path, state, config)
    logits = F.interpolate(mmseg_logits(state, pictures, **SIZES), pictures.shape[2:], mode="bilinear")[:, 0]
    expected = (logits.sigmoid() > used).to(torch.uint8)
    assert 0.02 < expected.double().mean() < 0.98
    assert torch.equal(segmenter.predict(pictures), expected)
    assert segmenter.info.notes == (f"its one output is class 1 where the sigmoid is above {used:g}, else class 0",)
    refused(
        save_mmengine(tmp_path / "a.pth", state, training_config(decode_head=head | {"threshold": 1.0})),
        "decode_head.threshold in the training config between 0 and 1, got 1.0",
    )


def test_slide_windows_are_what_predict_windows_takes_by_itself(tmp_path: Path) -> None:
    info = loaded(tmp_path, draw(mmseg_shapes("linear")), mmseg_config()).info
    assert (info.window, info.stride, info.stretch, info.enlarge) == ((512, 512), (480, 480), True, False)
    whole = training_config(test_cfg={"mode": "whole"})
    assert loaded(tmp_path, draw(mmseg_shapes("linear")), whole).info.window is None


RESIZE = "dict(type='Resize', scale=(60, 40), keep_ratio=True)"
PIPELINES = {
    "newer": newer_pipeline(RESIZE),
    "with mmcv's name": newer_pipeline(RESIZE.replace("'Resize'", "'mmcv.transforms.Resize'")),
    "one number": newer_pipeline(RESIZE.replace("(60, 40)", "47")),
    "older": older_pipeline("img_scale=(60, 40), flip=False"),
    "older, one ratio": older_pipeline("img_scale=(40, 60), img_ratios=[1.0], flip=False"),
    "alone": f"test_pipeline = [{RESIZE}]\n",
}


def resized(image: Tensor, text: str) -> Tensor:
    """What the test pipeline in a config makes of a picture: mmcv's ``imrescale``."""
    config: dict[str, Any] = {}
    exec(text, {"dict": dict}, config)
    steps = config.get("test_pipeline", ())
    steps = config["test_dataloader"]["dataset"]["pipeline"] if "test_dataloader" in config else steps
    steps = config["data"]["test"]["pipeline"] if "data" in config else steps
    for step in steps:
        if (scale := step.get("scale", step.get("img_scale"))) is not None:
            scale, (height, width) = (scale, scale) if isinstance(scale, int) else scale, image.shape[2:]
            factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
            new = int(height * factor + 0.5), int(width * factor + 0.5)
            image = F.interpolate(image, new, mode="bilinear", align_corners=False)
    return image


@torch.no_grad()
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("size", [(50, 55), (33, 90)])
def test_the_test_pipelines_resize_is_what_predict_windows_does_by_itself(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """EncoderDecoder's whole inference on the resized picture, its logits brought back to the picture's size."""
    state, image = state_of(mmseg_shapes("linear")), images(*size)
    text = training_config(test_cfg={"mode": "whole"})
    segmenter = loaded(tmp_path, state, text + "\n" + PIPELINES[name])
    inputs = resized(image, PIPELINES[name])
    logits = F.interpolate(mmseg_logits(state, inputs, **SIZES), inputs.shape[2:], mode="bilinear", align_corners=False)
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1).to(torch.uint8)
    labels = predict_windows(segmenter, image)
    assert inputs.shape != image.shape and torch.equal(labels, expected)
    own = predict_windows(segmenter, image, resize="own")
    assert (own != labels).any() and torch.equal(own, predict_windows(loaded(tmp_path, state, text), image))
    file = save_checkpoint(segmenter, tmp_path / "copy")
    assert torch.equal(predict_windows(load_segmenter(file), image), labels)


UNRUN = {
    "several ratios": (
        older_pipeline("img_scale=(60, 40), img_ratios=[0.5, 1.0], flip=False"),
        r"MultiScaleFlipAug.img_ratios .* to be None or 1.0 or \[1.0\], got \[0.5, 1.0\], which is not supported",
    ),
    "several scales": (older_pipeline("img_scale=[(60, 40), (90, 60)]"), r"expected resize to be \(shorter, longer\)"),
    "flip": (older_pipeline("img_scale=(60, 40), flip=True"), "MultiScaleFlipAug.flip .* to be False, got True"),
    "stretched": (newer_pipeline("dict(type='Resize', scale=(60, 40))"), "Resize.keep_ratio .* to be True, got False"),
    "older, stretched": (older_pipeline("img_scale=(60, 40)", "keep_ratio=False"), "Resize.keep_ratio .*got False"),
    "factor": (newer_pipeline("dict(type='Resize', scale_factor=2.0, keep_ratio=True)"), "Resize.scale_factor .*got 2.0"),
    "twice": (newer_pipeline(RESIZE, RESIZE), r"a second Resize .* to be None, got \(40, 60\)"),
    "another step": (newer_pipeline(RESIZE, "dict(type='ResizeToMultiple')"), "a step of the test pipeline .*got 'ResizeToMultiple'"),
    "no pixels": (newer_pipeline("dict(type='Resize', scale=(0, 40), keep_ratio=True)"), r"expected resize .*tuple \(0, 40\)"),
    "no step": ("test_pipeline = [3]\n", "training config"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNRUN)
def test_test_pipelines_that_are_not_run_so_are_refused_by_name(name: str, tmp_path: Path) -> None:
    text, message = UNRUN[name]
    refused(save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("linear")), mmseg_config() + text), message)


DTOP = {
    "backbone__type": "ViT_prune", "backbone__with_cls_token": False, "backbone__final_norm": False, "backbone__out_indices": [0, 1, 2],
    "decode_head": {"type": "PruneHead", "num_heads": 2, "thresh": 0.9},
    "auxiliary_head": [{"type": "PruneHead", "num_heads": 2, "thresh": t} for t in (0.3, 1.0)],
}  # fmt: skip


def sure(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class weights near 1, so that masks decide who halts."""
    for name in state:
        if name.endswith("class_embed.bias"):
            state[name] = torch.tensor([2.0, 0.0], dtype=torch.float64)
    return state


@torch.no_grad()
@pytest.mark.parametrize("thresholds", [(0.3, 1.0), (0.3, 0.25), (1.0, 1.0)])
def test_dtop(thresholds: tuple[float, float], tmp_path: Path) -> None:
    """Heads, blocks and thresholds of the config; who halts, and so every prediction, as in the original's loop."""
    state = sure(state_of(dtop_shapes(exits=2)))
    heads = [{"type": "PruneHead", "num_heads": 2, "thresh": each} for each in thresholds]
    segmenter = loaded(tmp_path, state, training_config(**{**DTOP, "auxiliary_head": heads}))
    assert segmenter.info.format == "DToP" and segmenter.info.stretch and segmenter.encoder.vit.num_prefix == 0
    assert [
        (block, float(head.threshold), head.keep_per_class) for block, head in segmenter.encoder.exit_heads().items()
    ] == [(number, pytest.approx(each), 5) for number, each in enumerate(thresholds, start=1)]
    exits = dict(enumerate(thresholds, start=1))
    for size in [(64, 64), (32, 56)]:
        expected = dtop_predictions(state, images(*size), **SIZES, exits=exits, atm_heads=2)
        close(segmenter(images(*size)), expected)
    halted = [int(stage.halted.sum()) for stage in segmenter.trace(images(64, 64)).stages]
    assert [bool(count) for count in halted] == [each < 1 for each in thresholds]
    again = load_segmenter(save_checkpoint(segmenter, tmp_path / "own"))
    assert torch.equal(again(images(64, 64)), segmenter(images(64, 64)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            None,
            "unused keys: auxiliary_head.*; blocks and thresholds of the exits are told by a training config in the file",
        ),
        ("model = build()", "unused keys: auxiliary_head.*; blocks and thresholds of the exits"),
        (
            training_config(**{**DTOP, "backbone__with_cls_token": None}),
            "backbone.with_cls_token .* to be False, got True",
        ),
        (training_config(**{**DTOP, "backbone__out_indices": [0, 1]}), "backbone.out_indices .* to be -1 or 2, got 1"),
        (training_config(**{**DTOP, "auxiliary_head": None}), "auxiliary_head .* to be 2, got 0"),
        (training_config(**{**DTOP, "decode_head__num_heads": 5}), "width: expected a multiple of num_heads=5, got 32"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
def test_dtop_that_does_not_tell_is_refused(config: str | None, message: str, tmp_path: Path) -> None:
    refused(
        save_mmengine(tmp_path / "a.pth", draw(dtop_shapes(exits=2)), config),
        message,
        num_heads=HEADS,
    )


def test_segvits_own_head_is_refused_by_name(tmp_path: Path) -> None:
    """ATMHead: a decoder per stage, whose masks are summed, and one class more."""
    tensors = draw(dtop_shapes(exits=0))
    tensors = {
        name.replace("decode_head.decoder.", "decode_head.decoder_1."): tensor for name, tensor in tensors.items()
    }
    tensors = {
        name.replace("_proj.", "_proj_1.").replace("proj_norm.", "proj_norm_1."): tensor
        for name, tensor in tensors.items()
    }
    refused(
        save_mmengine(tmp_path / "a.pth", tensors, mmseg_config()),
        "decode_head.decoder_1.*SegViT's head sums the masks of several blocks",
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a = dict(b=[1, (2.5, None)], c={'d': -1})", {"a": {"b": [1, (2.5, None)], "c": {"d": -1}}}),
        ("a = 1\nb = __import__('os').abort()\nc = open('x')\nd = a\ne = [x for x in 'ab']", {"a": 1}),
        ("a = dict(**b)\nc = {**b}\nd = dict([(1, 2)])\nprint('ran')", {}),
        ("a = (", {}),
        ("a = " + "[" * 5000 + "]" * 5000, {}),
        ("a.b = 1\nimport os", {}),
        (None, {}),
        (7, {}),
    ],
)
def test_configs_are_read_as_literals_and_never_run(text: object, found: dict[str, Any], capsys) -> None:
    assert literals(text) == found
    assert capsys.readouterr().out == ""
