"""load_checkpoint on what training scripts make of the published formats: prefixes, averaged copies, teachers and students; DeiT and
ALGM Segmenters and their windows; and that nobody is sent in circles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    DIM,
    GRID,
    HEADS,
    PATCH,
    changed_config,
    draw,
    refused,
    save_segmenter,
    segmenter_shapes,
    variant,
    vit_shapes,
)
from checkpoint_forwards import segmenter_logits, timm_features
from real_timm import timm
from torch import Tensor

from step_kernels.model import StepEncoder, load_checkpoint, load_encoder, load_segmenter

VIT, OTHER = draw(vit_shapes()), draw(vit_shapes(), seed=1)
IMAGES = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.ckpt")
    return folder / "file.ckpt"


def is_vit(encoder: StepEncoder, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = timm_features(tensors, IMAGES, heads=HEADS, patch=PATCH, grid=GRID)
        torch.testing.assert_close(encoder(IMAGES).tokens.view(1, -1, DIM), expected, rtol=1e-4, atol=1e-4)


HABITS = {
    "Lightning": {"state_dict": under("model.", VIT), "optimizer_states": [{"state": {0: torch.ones(2)}}], "epoch": 3},
    "Lightning, compiled": {"state_dict": under("model._orig_mod.", VIT), "hyper_parameters": {"lr": 0.1}},
    "DataParallel": under("module.", VIT),
    "both": {"model": under("module.", VIT), "optimizer": {"state": {"a": {"exp_avg": torch.ones(2)}}}},
    "a script's own": {"net": VIT, "args": {"lr": 0.1, "head": torch.ones(1)}},
    "averaged alone": {"state_dict_ema": VIT},
}


@pytest.mark.parametrize("habit", HABITS)
def test_prefixes_that_leave_no_choice_are_taken_off(habit: str, tmp_path: Path) -> None:
    is_vit(load_encoder(saved(tmp_path, HABITS[habit]), num_heads=HEADS), VIT)


CHOICES: dict[str, tuple[Any, str, list[str]]] = {  # content, the prefix that brings VIT, all prefixes
    "DINO": (
        {"student": under("module.backbone.", OTHER), "teacher": under("backbone.", VIT), "epoch": 3},
        "teacher.backbone.",
        ["student.module.backbone.", "teacher.backbone."],
    ),
    "DINO's teacher": (
        {"teacher": under("backbone.", VIT) | {"dino_head.x": torch.ones(1)}},
        "teacher.backbone.",
        ["teacher.backbone."],
    ),
    "MoCo": (
        {"state_dict": under("module.base_encoder.", VIT) | under("module.momentum_encoder.", OTHER)},
        "state_dict.module.base_encoder.",
        ["state_dict.module.base_encoder.", "state_dict.module.momentum_encoder."],
    ),
    "timm's average": (
        {"state_dict": OTHER, "state_dict_ema": VIT},
        "state_dict_ema.",
        ["state_dict.", "state_dict_ema."],
    ),
    "Lightning's average": (
        {"state_dict": under("model.", OTHER) | under("ema_model.", VIT)},
        "state_dict.ema_model.",
        ["state_dict.ema_model.", "state_dict.model."],
    ),
    "an encoder of MAE's kind": ({"model": under("encoder.", VIT)}, "model.encoder.", []),
}


@pytest.mark.parametrize("name", CHOICES)
def test_where_there_is_a_choice_the_prefix_is_asked_for(name: str, tmp_path: Path) -> None:
    content, prefix, all_of_them = CHOICES[name]
    path = saved(tmp_path, content)
    refused(
        path,
        "prefix=: " + ", ".join(map(repr, all_of_them))
        if all_of_them
        else "got tensors blocks.0|got tensors encoder.blocks.0",
    )
    is_vit(load_encoder(path, num_heads=HEADS, prefix=prefix), VIT)
    refused(path, "file.ckpt: expected tensors by name under 'none.', got nothing; tell one as prefix=", prefix="none.")


def test_names_beside_the_prefix_are_not_passed_over(tmp_path: Path) -> None:
    """A part of the model may be among them."""
    path = saved(tmp_path, {"state_dict": under("model.", VIT) | {"adapter.weight": torch.ones(1)}})
    refused(
        path,
        "names that begin with state_dict.model., got unused keys: state_dict.adapter.weight; tell one as prefix=: 'state_dict.model.'",
    )
    is_vit(load_encoder(path, num_heads=HEADS, prefix="state_dict.model."), VIT)


def test_what_is_under_a_prefix_must_be_tensors(tmp_path: Path) -> None:
    refused(saved(tmp_path, {"model": VIT | {"step": 3}}), "expected tensors by name.*got int at 'step'")
    content = {"model": VIT}
    content["self"] = content  # type: ignore[assignment]  # a pickle may hold itself
    is_vit(load_encoder(saved(tmp_path, content), num_heads=HEADS), VIT)


@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
def test_deit_segmenter(decoder: str, tmp_path: Path) -> None:
    """Two of the nine published files: a distillation token behind the class token, and its head."""
    shapes = segmenter_shapes(decoder) | {"encoder.dist_token": (1, 1, DIM), "encoder.pos_embed": (1, 18, DIM)}
    shapes |= {"encoder.head_dist.weight": (1000, DIM), "encoder.head_dist.bias": (1000,)}
    state = {name: tensor.double() for name, tensor in draw(shapes).items()}
    text = changed_config(
        changed_config(variant(decoder), "normalization", "normalization: deit"), "distilled", "distilled: true"
    )
    segmenter = load_segmenter(save_segmenter(tmp_path, decoder, text, state))
    assert segmenter.encoder.vit.num_prefix == 2 and segmenter.info.mean == (0.485, 0.456, 0.406)
    assert {"encoder.head_dist.bias", "encoder.head_dist.weight"} < set(segmenter.info.ignored)
    for size in [(32, 32), (37, 61)]:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = segmenter_logits(state, images, heads=HEADS, patch=PATCH, grid=GRID)
            torch.testing.assert_close(segmenter(images), expected, rtol=1e-10, atol=1e-10)
    del state["encoder.pos_embed"]
    refused(save_segmenter(tmp_path, decoder, text, state), "missing key: encoder.pos_embed")


def with_lines(text: str, *lines: str) -> str:
    return "\n".join([text, *lines, ""])


def test_inference_kwargs_are_the_windows(tmp_path: Path) -> None:
    text = with_lines(
        variant("linear"), "inference_kwargs:", "  im_size: 520", "  window_size: 480", "  window_stride: 320"
    )
    info = load_checkpoint(save_segmenter(tmp_path, "linear", text)).info
    assert (info.window, info.stride, info.enlarge, info.stretch) == ((480, 480), (320, 320), True, False)
    for line, message in (
        ("  window_size: 480.0", r"expected window to be \(height, width\) in pixels, got tuple \(480.0, 480.0\)"),
        ("  window_size: 0", r"expected window to be .*, got tuple \(0, 0\)"),
    ):
        refused(save_segmenter(tmp_path, "linear", text.replace("  window_size: 480", line)), message)


NEITHER = {  # timm's models that from_timm refuses, too
    "beit_base_patch16_224": "relative_position_bias_table",
    "vit_relpos_small_patch16_224": "rel_pos",
    "vit_tiny_r_s16_p8_224": "patch_embed.backbone",
    "cait_xxs24_224": "blocks_token_only",
}


@pytest.mark.parametrize("name", NEITHER)
def test_nobody_is_sent_in_circles(name: str, tmp_path: Path) -> None:
    sizes = {} if "_r_" in name else {"depth": 1}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, img_size=224, **sizes)
    with pytest.raises((NotImplementedError, TypeError)):
        StepEncoder.from_timm(model, verify=False)
    tensors = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in model.state_dict().items()}
    refused(saved(tmp_path, tensors), f"{NEITHER[name]}.*StepEncoder.from_timm does not run it either$", num_heads=2)
