"""load_checkpoint on files in the public formats, against each format's own forward in plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_cases import (
    CLASSES,
    DIM,
    GRID,
    HEADS,
    PATCH,
    draw,
    mmseg_config,
    mmseg_shapes,
    refused,
    save_mmengine,
    save_segmenter,
    segmenter_shapes,
    variant,
    vit_shapes,
)
from checkpoint_forwards import mmseg_logits, segmenter_logits, timm_features
from torch import Tensor

from step_kernels.model import StepEncoder, StepSegmenter, checkpoint_info, load_checkpoint
from step_kernels.model.checkpoints import build_model, matched_tensors
from step_kernels.model.checkpoints.files import METADATA_GLOBALS, CheckpointFile
from step_kernels.model.checkpoints.formats import public_recipe

# The stored grid; one that grows in a direction and shrinks in the other; one that needs padding.
SIZES = [(32, 32), (48, 24), (37, 61)]
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}  # fp32 would not show another epsilon
DTYPES = list(TOLERANCES)
TOLD = {"num_heads": HEADS, "img_size": (32, 32)}


def images(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def tensors_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in draw(shapes).items()}


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert expected.std() > 0.3, "too flat to tell right from wrong"
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_timm_features(wrapper: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    state = tensors_of(vit_shapes(), dtype)
    path = tmp_path / ("vit.pth" if wrapper else "model.safetensors")
    if wrapper is None:
        safetensors.torch.save_file(state, path)
        (tmp_path / "config.json").write_text(
            '{"architecture": "vit_tiny_patch8_32"}'
        )  # as the Hugging Face hub has it
    else:
        torch.save({wrapper: {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 1}, path)
    encoder = load_checkpoint(path, num_heads=HEADS)
    assert isinstance(encoder, StepEncoder) and not encoder.training and encoder.policy is None
    for size in SIZES:
        pictures = images(size, dtype)
        expected = timm_features(state, pictures, heads=HEADS, patch=PATCH, grid=GRID)
        with torch.no_grad():
            out = encoder(pictures)
            close(out.tokens.view(2, -1, DIM), expected)
            close(encoder.vit(pictures), expected)
    assert checkpoint_info(path, num_heads=HEADS).ignored == ("head.bias", "head.weight")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
def test_segmenter_logits(decoder: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = tensors_of(segmenter_shapes(decoder), dtype)
    save_segmenter(tmp_path, decoder, variant(decoder), state)
    segmenter = load_checkpoint(tmp_path)
    assert isinstance(segmenter, StepSegmenter) and segmenter.num_classes == CLASSES
    for size in SIZES:
        pictures = images(size, dtype)
        expected = segmenter_logits(state, pictures, heads=HEADS, patch=PATCH, grid=GRID)
        with torch.no_grad():
            close(segmenter(pictures), expected)
    info = checkpoint_info(tmp_path / "checkpoint.pth")
    assert info.format == "Segmenter" and info.ignored == ("encoder.head.bias", "encoder.head.weight")
    assert info.mean == info.std == (0.5, 0.5, 0.5)


def test_segmenter_without_variant_and_not_square(tmp_path: Path) -> None:
    """A grid of 2 x 8 has as many positions as one of 4 x 4: the caller's image size decides."""
    path = save_segmenter(tmp_path, "mask_transformer", None)
    state = draw(segmenter_shapes("mask_transformer"))
    segmenter = load_checkpoint(path, num_heads=HEADS, img_size=(16, 64))
    for size in [(16, 64), (40, 32)]:
        pictures = images(size, torch.float32)
        with torch.no_grad():
            close(segmenter(pictures), segmenter_logits(state, pictures, heads=HEADS, patch=PATCH, grid=(2, 8)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
def test_mmseg_logits(decoder: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = tensors_of(mmseg_shapes(decoder), dtype)
    path = save_mmengine(tmp_path / "iter_160000.pth", state, mmseg_config())
    segmenter = load_checkpoint(path, **TOLD)
    assert isinstance(segmenter, StepSegmenter)
    for size in SIZES:
        pictures = images(size, dtype)
        expected = mmseg_logits(state, pictures, heads=HEADS, patch=PATCH, grid=GRID)
        with torch.no_grad():
            close(segmenter(pictures), expected)
    info = checkpoint_info(path, **TOLD)
    assert info.ignored == (("decode_head.conv_seg.bias", "decode_head.conv_seg.weight") if "mask" in decoder else ())
    assert info.classes == ("sky", "sea") and info.palette == ((6, 230, 230), (9, 7, 230))
    assert info.mean == info.std == (0.5, 0.5, 0.5)


def test_mmengine_objects_are_never_built(tmp_path: Path) -> None:
    """The file really holds them (PyTorch alone refuses it), under old and new names; the inert stand-ins take their places."""
    path = save_mmengine(tmp_path / "a.pth", draw(mmseg_shapes("linear")), mmseg_config())
    held = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"builtins.getattr", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar"} < set(held)
    assert set(held) <= set(METADATA_GLOBALS)
    load_checkpoint(path, **TOLD)
    assert set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) == set(held), "left something allowed"


def test_files_of_the_older_mmcv(tmp_path: Path) -> None:
    """Classes without colours."""
    meta = {"config": mmseg_config(), "CLASSES": ["sky", "sea"], "PALETTE": None}
    torch.save({"meta": meta, "state_dict": draw(mmseg_shapes("mask_transformer"))}, tmp_path / "a.pth")
    info = checkpoint_info(tmp_path, **TOLD)
    assert info.classes == ("sky", "sea") and info.palette is None


@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
@pytest.mark.parametrize("palette", ["random", [1, 2, 3], [np.array([6, 230, 230])]])
def test_colours_of_another_kind_are_none(palette: object, tmp_path: Path) -> None:
    """Arrays, say, which are never built."""
    meta = {"dataset_meta": {"classes": ["sky"], "palette": palette}}
    torch.save({"meta": meta, "state_dict": draw(mmseg_shapes("linear"))}, tmp_path / "a.pth")
    info = checkpoint_info(tmp_path, **TOLD)
    assert info.classes == ("sky",) and info.palette is None


@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
def test_sizes_are_asked_for_and_no_training_config_is_run(tmp_path: Path) -> None:
    tensors = draw(mmseg_shapes("mask_transformer"))
    path = save_mmengine(tmp_path / "a.pth", tensors, None)
    refused(path, "num_heads: expected the number of attention heads")
    assert load_checkpoint(path, num_heads=HEADS).encoder.vit.config.eps == 1e-6
    for text in ("model = (", "model = dict(backbone=__import__('os').abort())"):
        path = save_mmengine(tmp_path / "a.pth", tensors, text)
        refused(path, "num_heads: expected the number of attention heads")
        assert load_checkpoint(path, **TOLD).encoder.vit.config.eps == 1e-6


def test_a_standard_width_does_not_stand_for_its_heads(tmp_path: Path) -> None:
    tensors = draw(mmseg_shapes("linear", dim=192, depth=12))
    config = mmseg_config(num_heads=12, embed_dims=192, num_layers=12)
    segmenter = load_checkpoint(save_mmengine(tmp_path / "a.pth", tensors, config))
    assert {block.attn.num_heads for block in segmenter.encoder.vit.blocks} == {12}


def test_half_precision_and_mixed_files(tmp_path: Path) -> None:
    state = tensors_of(vit_shapes(), torch.bfloat16)
    torch.save(state, tmp_path / "half.pth")
    assert {p.dtype for p in load_checkpoint(tmp_path / "half.pth", num_heads=HEADS).parameters()} == {torch.bfloat16}
    state["norm.weight"] = state["norm.weight"].half()
    torch.save(state, tmp_path / "mixed.pth")
    encoder = load_checkpoint(tmp_path / "mixed.pth", num_heads=HEADS)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32} and all(
        p.requires_grad for p in encoder.parameters()
    )
    assert torch.equal(encoder.vit.norm.weight, state["norm.weight"].float())


REAL = {"dim": 1024, "depth": 24, "patch": 16, "cells": 40 * 40}  # ViT-L/16 at 640 px, 150 classes


@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
@pytest.mark.parametrize(
    ("name", "shapes", "eps"),
    [
        ("timm ViT", vit_shapes(**REAL), (1e-6, None)),
        ("Segmenter", segmenter_shapes("mask_transformer", 150, **REAL), (1e-5, 1e-5)),
        ("mmsegmentation Segmenter", mmseg_shapes("mask_transformer", 150, **REAL), (1e-6, 1e-5)),
    ],
)
def test_a_real_size_needs_no_hint(
    name: str, shapes: dict[str, tuple[int, ...]], eps: tuple[float, float | None]
) -> None:
    """All sizes of ViT-L from names and shapes alone, on the meta device."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    file = CheckpointFile(Path("checkpoint.pth"), {"": state}, {})
    kind, config, info = public_recipe(file, dict.fromkeys(("num_heads", "img_size", "quota")))
    model = build_model(config)
    tensors, ignored = matched_tensors(model, file, kind)
    assert info.format == name and tensors.keys() == model.state_dict().keys()
    assert len(tensors) + len(ignored) == len(shapes)
    vit = (model.encoder if isinstance(model, StepSegmenter) else model).vit
    assert (vit.config.num_heads, vit.config.img_size, vit.patch_size) == (16, (640, 640), 16)
    assert {norm.eps for norm in vit.modules() if isinstance(norm, torch.nn.LayerNorm)} == {eps[0]}
    if isinstance(model, StepSegmenter):
        assert {norm.eps for norm in model.decoder.modules() if isinstance(norm, torch.nn.LayerNorm)} == {eps[1]}
        assert [block.attn.num_heads for block in model.decoder.blocks] == [16, 16]
