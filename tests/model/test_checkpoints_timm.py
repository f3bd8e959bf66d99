"""load_checkpoint on what real timm models save: the plain ViT equals timm's own, every other one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_cases import DEPTH, DIM, HEADS, PATCH, draw, vit_shapes
from real_timm import timm

from step_kernels.model import StepEncoder, load_checkpoint

SMALL = {"img_size": 4 * PATCH, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}


def timm_model(name: str, **settings: object) -> torch.nn.Module:
    return timm.create_model(name, pretrained=False, **{**SMALL, **settings}).eval()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch32_384", "vit_small_patch14_dinov2"]
)
def test_plain_models_give_timms_features(name: str, tmp_path: Path) -> None:
    model = timm_model(name, dynamic_img_size=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if "dinov2" not in name:  # no classifier, and LayerScale, which is folded into the projections
        assert shapes == vit_shapes(), "the small files of the other tests are not timm's any more"
    model.load_state_dict(draw(shapes))
    torch.save(model.double().state_dict(), tmp_path / "vit.pth")
    encoder = load_checkpoint(tmp_path / "vit.pth", num_heads=HEADS)
    assert isinstance(encoder, StepEncoder)
    # timm resizes positions in fp32, whatever the model's dtype.
    for size, tolerance in [((32, 32), 1e-9), ((48, 24), 2e-6)]:
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            found, expected = encoder(images).tokens.view(2, -1, DIM), model.forward_features(images)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


OTHERS = {
    "deit_tiny_distilled_patch16_224": "17 patches",
    "deit3_small_patch16_224": "slot for the class token",
    "vit_small_patch14_reg4_dinov2": "slot for the class token",
    "vit_base_patch16_clip_224": "norm_pre",
    "vit_base_patch16_siglip_224": "missing key: cls_token",
    "vit_medium_patch16_gap_240": "missing key: cls_token",
    "vit_base_patch16_rpn_224": "missing key: cls_token",
    "eva02_tiny_patch14_224": "blocks.0.attn.q_bias",
    "eva_large_patch14_196": "fc_norm",
    "vit_small_patch16_dinov3": "missing key: pos_embed",
    "flexivit_small": "slot for the class token",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused(name: str, tmp_path: Path) -> None:
    model = timm_model(name, depth=1)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"{OTHERS[name]}.*StepEncoder.from_timm"):
        load_checkpoint(tmp_path / "vit.pth", num_heads=HEADS)


def test_pooling_models_are_refused(tmp_path: Path) -> None:
    """Their final norm comes after the pooling, so tokens leave the blocks as they are."""
    torch.save(timm_model("vit_tiny_patch16_224", global_pool="avg").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(
        ValueError, match=r"missing keys: norm.bias, norm.weight; 2 unused keys: fc_norm.bias, fc_norm.weight;"
    ):
        load_checkpoint(tmp_path / "vit.pth", num_heads=HEADS)
