"""load_checkpoint on what others make of the published formats: DeiT's Segmenters, mmsegmentation without patch bias, SegViT; and that
nobody is sent in circles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    DIM,
    GRID,
    HEADS,
    PATCH,
    changed_config,
    draw,
    mmseg_shapes,
    refused,
    save_mmengine,
    save_segmenter,
    segmenter_shapes,
    variant,
)
from checkpoint_forwards import mmseg_logits, segmenter_logits
from real_timm import timm

from step_kernels.model import StepEncoder, load_checkpoint, load_segmenter, save_checkpoint


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
        again = load_segmenter(save_checkpoint(segmenter, tmp_path / "own"))
        assert torch.equal(again(images), segmenter(images))
    del state["encoder.pos_embed"]
    refused(save_segmenter(tmp_path, decoder, text, state), "missing key: encoder.pos_embed")


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
def test_a_missing_patch_bias_is_zero(decoder: str, tmp_path: Path) -> None:
    """mmsegmentation >= 1.2 trains without one; what no tensor of its files tells is warned of by name."""
    state = {name: tensor.double() for name, tensor in draw(mmseg_shapes(decoder)).items()}
    del state["backbone.patch_embed.projection.bias"]
    path = save_mmengine(tmp_path / "a.pth", state, None)
    with pytest.warns(
        UserWarning,
        match="a.pth: no tensor tells, so taken for granted: class token on, GELU, .* bicubic positions, heads",
    ):
        segmenter = load_checkpoint(path, num_heads=HEADS)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = mmseg_logits(state, images, heads=HEADS, patch=PATCH, grid=GRID)
    torch.testing.assert_close(segmenter(images), expected, rtol=1e-10, atol=1e-10)


def test_segvits_own_head_is_refused_by_name(tmp_path: Path) -> None:
    tensors = draw(mmseg_shapes("linear")) | {"decode_head.decoder_1.layers.0.linear1.weight": torch.zeros(4, 4)}
    refused(
        save_mmengine(tmp_path / "a.pth", tensors, None),
        "decode_head.decoder_1.*: SegViT's head sums the masks of several blocks",
    )


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
    torch.save(tensors, path := tmp_path / "vit.pth")
    refused(path, f"{NEITHER[name]}.*StepEncoder.from_timm does not run it either$", num_heads=2)
