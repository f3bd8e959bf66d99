"""The dense ViT: timm's names, position resize, padding, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import small_vit

from step_kernels.model import ViT, ViTConfig, resize_positions

PRESETS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        vit = ViT.preset(name, img_size=224)
    dim, depth, heads = PRESETS[name]
    assert (vit.embed_dim, vit.depth, vit.patch_size) == (dim, depth, 16)
    assert all(block.attn.num_heads == heads for block in vit.blocks)
    # Parameter counts of timm's vit_*_patch16_224 without its 1000-class head.
    expected = {"tiny": 5_524_416, "small": 21_665_664, "base": 85_798_656, "large": 303_301_632}
    assert sum(parameter.numel() for parameter in vit.parameters()) == expected[name]


def test_parameter_names_are_those_of_timm() -> None:
    names = set(dict(small_vit(depth=1).named_parameters()))
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.0.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {"norm.weight", "norm.bias"}
    assert names == expected


def test_initialisation_is_truncated_normal_with_zero_bias() -> None:
    vit = ViT.preset("tiny", img_size=64, depth=1)
    weight = vit.blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert vit.cls_token.abs().max() < 1e-5
    assert not vit.blocks[0].mlp.fc1.bias.any()


def test_forward_equals_the_formula_written_out() -> None:
    """Multi-head attention spelled with einsum, no module reused."""
    vit = small_vit(depth=2, dtype=torch.float64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    patches = images.view(2, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, 64, -1)
    projection = vit.patch_embed.proj
    x = patches @ projection.weight.flatten(1).T + projection.bias
    x = torch.cat([vit.cls_token.expand(2, -1, -1), x], 1) + vit.pos_embed

    def norm(x: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    for block in vit.blocks:
        qkv = norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
        q, k, v = qkv.view(2, 65, 3, 3, 16).unbind(2)
        weights = torch.einsum("blhd,bmhd->bhlm", q, k).div(4.0).softmax(-1)
        mixed = torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(2)
        x = x + mixed @ block.attn.proj.weight.T + block.attn.proj.bias
        hidden = norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(vit(images), norm(x, vit.norm), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 90), (8, 8), (1, 17)])
def test_images_are_padded_with_zeros_at_the_bottom_and_right(height: int, width: int) -> None:
    vit = small_vit(depth=1)
    images = torch.randn(2, 3, height, width)
    rows, cols = -(-height // 8), -(-width // 8)
    padded = torch.zeros(2, 3, rows * 8, cols * 8)
    padded[:, :, :height, :width] = images
    out = vit(images)
    assert out.shape == (2, 1 + rows * cols, vit.embed_dim)
    assert torch.equal(out, vit(padded))


def test_positions_resize_by_the_rule_of_each_format() -> None:
    positions = torch.randn(6 * 4, 7, dtype=torch.float64)
    image = positions.view(1, 6, 4, 7).permute(0, 3, 1, 2)
    timm = F.interpolate(image, (3, 9), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(27, 7)
    segmenter = F.interpolate(image, (3, 9), mode="bilinear").permute(0, 2, 3, 1).reshape(27, 7)
    torch.testing.assert_close(resize_positions(positions, (6, 4), (3, 9), "bicubic"), timm, rtol=0, atol=1e-14)
    torch.testing.assert_close(resize_positions(positions, (6, 4), (3, 9), "bilinear"), segmenter, rtol=0, atol=1e-14)
    assert not torch.allclose(timm, segmenter, atol=1e-2)


def test_positions_of_the_stored_grid_are_left_alone_and_keep_their_dtype() -> None:
    positions = torch.randn(6, 4, dtype=torch.bfloat16)
    assert resize_positions(positions, (2, 3), (2, 3), "bicubic") is positions
    resized = resize_positions(positions, (2, 3), (4, 6), "bicubic")
    assert resized.dtype == torch.bfloat16
    wide = resize_positions(positions.float(), (2, 3), (4, 6), "bicubic")
    assert torch.equal(resized, wide.bfloat16()), "half precision is resized in fp32 and rounded once"


def test_the_position_rule_of_the_config_is_used() -> None:
    images = torch.randn(1, 3, 80, 40)
    bicubic = small_vit(depth=1)
    bilinear = ViT(ViTConfig(48, 1, 3, img_size=64, patch_size=8, position_rule="bilinear"))
    bilinear.load_state_dict(bicubic.state_dict())
    assert not torch.allclose(bicubic(images), bilinear(images), atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"embed_dim": 50}, ValueError, "embed_dim: expected a multiple of num_heads=3, got 50"),
        ({"depth": 0}, ValueError, "depth"),
        ({"num_heads": 2.0}, TypeError, "num_heads"),
        ({"mlp_ratio": -1.0}, ValueError, "mlp_ratio: expected a positive, finite number, got -1.0"),
        ({"mlp_ratio": float("inf")}, ValueError, "mlp_ratio: expected a positive, finite number, got inf"),
        ({"mlp_ratio": 0.001}, ValueError, "mlp_ratio: expected at least one hidden channel"),
        ({"mlp_ratio": "4"}, TypeError, "mlp_ratio: expected a float, got str '4'"),
        ({"eps": None}, TypeError, "eps: expected a float, got NoneType None"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"img_size": (64, 0)}, ValueError, "img_size"),
        ({"img_size": "64"}, TypeError, "img_size"),
        ({"position_rule": "nearest"}, ValueError, "position_rule"),
        ({"heads": 3}, TypeError, "heads"),
    ],
)
def test_bad_sizes_are_refused_by_name(overrides: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ViT.preset("tiny", **overrides)


def test_sizes_may_be_numpy_numbers() -> None:
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 64, "patch_size": 8}
    config = ViTConfig(**{name: np.int64(size) for name, size in sizes.items()}, mlp_ratio=np.float32(2))
    assert config.grid == (8, 8) and type(config.embed_dim) is int
    assert ViT(config)(torch.zeros(1, 3, 64, 64)).shape == (1, 65, 48)


def test_unknown_preset_and_config_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of 'tiny'.* got 'huge'"):
        ViT.preset("huge")
    with pytest.raises(TypeError, match="config: expected a ViTConfig"):
        ViT({"embed_dim": 48})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("positions", "old", "new", "rule", "message"),
    [
        (torch.zeros(5, 4), (2, 3), (4, 6), "bicubic", "positions"),
        (torch.zeros(1, 6, 4), (2, 3), (4, 6), "bicubic", "positions"),
        (torch.zeros(6, 4), (2, 3), (0, 6), "bicubic", "new_grid"),
        (torch.zeros(6, 4), (2, 3), (4, 6), "area", "rule"),
    ],
)
def test_bad_positions_are_refused_by_name(
    positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int], rule: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resize_positions(positions, old, new, rule)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"images: expected shape \[B, 3, H, W\], got \[3, 64, 64\]"),
        (torch.zeros(2, 4, 64, 64), ValueError, r"images: expected shape \[B, 3, H, W\]"),
        (torch.zeros(0, 3, 64, 64), ValueError, "images: expected at least one image"),
        (torch.zeros(1, 3, 0, 64), ValueError, "images: expected at least one image and one pixel"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "images: expected torch.float32"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float64), TypeError, "images: expected torch.float32"),
        (torch.zeros(1, 3, 64, 64, device="meta"), ValueError, "images: expected a tensor on cpu"),
        ([1, 2], TypeError, "images: expected a tensor"),
    ],
)
def test_bad_images_are_refused_by_name(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_vit(depth=1)(images)
