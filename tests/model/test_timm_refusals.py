"""What from_timm does not know it refuses by name: no part of a model is passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from real_timm import timm
from small_models import small_vit
from timm.layers import DiffAttention
from timm.models import vision_transformer as vit_file
from timm_models import SMALL, build, encoder_of, pictures
from torch import nn

from step_kernels.model import StepEncoder

TINY = {**SMALL, "depth": 1, "img_size": 32}


def plain(**changes: Any) -> Any:
    return timm.models.VisionTransformer(**{**TINY, **changes})


def eva(**changes: Any) -> Any:
    return timm.models.Eva(**{**TINY, **changes})


def create(name: str, **changes: Any) -> Any:
    return timm.create_model(name, pretrained=False, **changes)


def with_part(path: str, make: Callable[[nn.Module], nn.Module], model: Callable[[], Any] = plain) -> Any:
    """A model with one of its parts replaced."""
    whole = model()
    parent, _, name = path.rpartition(".")
    setattr(whole.get_submodule(parent), name, make(whole.get_submodule(path)))
    return whole


def with_extra(path: str, name: str, value: nn.Parameter | nn.Module | torch.Tensor) -> Any:
    whole = plain()
    part = whole.get_submodule(path)
    part.register_buffer(name, value) if type(value) is torch.Tensor else setattr(part, name, value)
    return whole


class MyBlock(vit_file.Block):
    """A subclass may override anything."""


class MyModel(timm.models.VisionTransformer):
    """The same."""


def hooked() -> Any:
    model = plain()
    model.blocks[0].attn.register_forward_hook(lambda *_: None)
    return model


def patched() -> Any:
    model = plain()
    model.blocks[0].mlp.forward = lambda x: x
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "parallel scaling": (lambda: plain(block_fn=vit_file.ParallelScalingBlock), "ParallelScalingBlock .*side by side"),
    "parallel things": (lambda: plain(block_fn=vit_file.ParallelThingsBlock), "ParallelThingsBlock .*side by side"),
    "differential, parallel": (
        lambda: plain(block_fn=vit_file.DiffParallelScalingBlock),
        "DiffParallelScalingBlock .*differential attention",
    ),
    "differential": (lambda: plain(attn_layer=DiffAttention), "DiffAttention .*differential attention"),
    "post-norm": (lambda: plain(block_fn=vit_file.ResPostBlock), "ResPostBlock .*norms follow"),
    "post-norm EVA": (lambda: eva(use_post_norm=True), "EvaBlockPostNorm .*norms follow"),
    "patch dropout": (lambda: plain(patch_drop_rate=0.5), "PatchDropout .*dropped at random"),
    "patch dropout of EVA": (lambda: eva(patch_drop_rate=0.5), "PatchDropoutWithIndices .*dropped at random"),
    "mixed rotations": (
        lambda: eva(use_rot_pos_emb=True, rope_type="mixed"),
        "RotaryEmbeddingMixed .*from block to block",
    ),
    "relative positions, BEiT": (lambda: create("beit_base_patch16_224", **TINY), "Beit .*relative positions"),
    "relative positions, ViT": (
        lambda: create("vit_relpos_small_patch16_224", **TINY),
        "VisionTransformerRelPos .*expected VisionTransformer or",
    ),
    "SAM": (
        lambda: create("samvit_base_patch16_224", depth=1, embed_dim=64, num_heads=2),
        "VisionTransformerSAM .*windows",
    ),
    "Hiera": (lambda: create("hiera_tiny_224", embed_dim=16, stages=(1, 1, 1, 1)), "Hiera .*pooled between stages"),
    "Swin": (
        lambda: create("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1)),
        "SwinTransformer .*shifted windows",
    ),
    "hybrid stem": (lambda: create("vit_tiny_r_s16_p8_224", **TINY), "HybridEmbed .*CNN"),
    "ConvNeXt": (lambda: create("convnext_atto"), "ConvNeXt .*expected VisionTransformer or"),
    "another's model": (lambda: MyModel(**TINY), "MyModel .*expected VisionTransformer or"),
    "another's block": (lambda: plain(block_fn=MyBlock), r"blocks\.0: .*MyBlock .*expected Block"),
    "another's attention projection": (
        lambda: with_part("blocks.0.attn.qkv", lambda old: nn.Bilinear(64, 64, 192)),
        r"attn\.qkv: Bilinear .*expected Linear",
    ),
    "another activation": (
        lambda: with_part("blocks.0.mlp.act", lambda old: nn.Softmax(-1)),
        "Softmax .*expected GELU",
    ),
    "a parametrised embedding": (
        lambda: with_part("patch_embed.proj", nn.utils.parametrizations.weight_norm),
        "ParametrizedConv2d .*expected Conv2d",
    ),
    "an unknown parameter": (
        lambda: with_extra("blocks.0", "scale", nn.Parameter(torch.ones(64))),
        r"blocks\.0\.scale: Block .*not expected to have this parameter",
    ),
    "an unknown buffer": (
        lambda: with_extra("blocks.0.attn", "bias_table", torch.ones(3)),
        r"attn\.bias_table: Attention",
    ),
    "an unknown submodule": (
        lambda: with_extra("blocks.0.attn", "extra", nn.Linear(2, 2)),
        r"attn\.extra: Linear .*Attention is not expected to have it",
    ),
    "a hook": (hooked, r"blocks\.0\.attn: Attention .*hooks"),
    "a replaced forward": (patched, r"blocks\.0\.mlp: Mlp .*forward was replaced"),
    "overlapping patches": (
        lambda: with_part("patch_embed.proj", lambda old: nn.Conv2d(3, 64, kernel_size=16, stride=8)),
        r"patch_embed\.proj: Conv2d .*side by side",
    ),
    "oblong patches": (lambda: plain(patch_size=(16, 8)), r"patch_embed\.proj: Conv2d .*square"),
    "a wrapped model": (lambda: nn.Sequential(plain()), "Sequential .*expected VisionTransformer or"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_class_and_reason(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(NotImplementedError, match=message):
        StepEncoder.from_timm(model, verify=False)


def hook_a_block(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda *_: None)


def hook_before_the_embedding(model: Any) -> None:
    model.patch_embed.proj.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook_a_block, r"vit\.blocks\.0: Block .*hooks"),
        (hook_before_the_embedding, r"vit\.patch_embed\.proj: Conv2d .*hooks"),
    ],
)
@torch.no_grad()
def test_what_is_put_in_later_is_refused_on_the_next_run(change: Callable[[Any], None], message: str) -> None:
    model, images = plain().eval(), torch.randn(1, 3, 32, 32)
    encoder = StepEncoder.from_timm(model, verify=False)
    encoder(images)
    change(model)
    for run in (encoder, encoder.forward_features):
        with pytest.raises(NotImplementedError, match=message):
            run(images)


@pytest.mark.parametrize("model", [None, 3, lambda x: x])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="vit: expected a timm model"):
        StepEncoder.from_timm(model)


def test_dropout_of_attention_weights_is_refused_in_training_only() -> None:
    encoder = StepEncoder.from_timm(plain(attn_drop_rate=0.1).eval())
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        encoder.forward_features(images)
    with pytest.raises(NotImplementedError, match=r"attn_drop: Dropout .*in training"):
        encoder.train().forward_features(images)


@pytest.mark.parametrize("method", ["forward_features", "forward_intermediates"])
def test_masks_are_refused(method: str) -> None:
    model = build("AugReg", depth=1)
    call, images = getattr(encoder_of(model), method), pictures(model, 1)
    with pytest.raises(NotImplementedError, match="attn_mask: expected None"):
        call(images, attn_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="is_causal: expected False"):
        call(images, is_causal=True)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([3], ValueError, r"indices\[0\]: expected an int between -3 and 2, got 3"),
        ([0, -4], ValueError, r"indices\[1\]: expected an int between -3 and 2, got -4"),
        (0, ValueError, "indices: expected an int between 1 and 3, got 0"),
        ([], ValueError, "indices: expected at least one block"),
        (torch.tensor([0, 3]), ValueError, r"indices\[1\]: expected an int between -3 and 2, got 3"),
        ("all", TypeError, "indices: expected an int or a sequence of ints, got str 'all'"),
        (b"\0", TypeError, "indices: expected an int or a sequence of ints, got bytes"),
        (1.5, TypeError, "indices: expected an int or a sequence of ints, got float 1.5"),
        ([0.0], TypeError, r"indices\[0\]: expected an int"),
    ],
)
def test_bad_indices_are_refused(indices: Any, error: type[Exception], message: str) -> None:
    model = build("AugReg", torch.float32)
    with pytest.raises(error, match=message):
        encoder_of(model).forward_intermediates(pictures(model, 1), indices)


def test_unknown_formats_are_refused() -> None:
    model = build("AugReg", torch.float32)
    with pytest.raises(ValueError, match="output_fmt: expected one of 'NCHW', 'NLC'"):
        encoder_of(model).forward_intermediates(pictures(model, 1), output_fmt="NHWC")


def test_a_plain_vit_does_not_classify() -> None:
    with pytest.raises(TypeError, match="classify: expected the encoder of a timm model, got one of ViT"):
        StepEncoder(small_vit(depth=1)).classify(torch.randn(1, 3, 64, 64))


def test_bilinear_pooling_behind_a_patch_norm_is_refused() -> None:
    encoder = StepEncoder.from_timm(build("AIMv2", depth=1), resample="bilinear")
    with pytest.raises(NotImplementedError, match=r"patch_embed\.norm: RmsNorm .*resample='area'"):
        encoder.forward_features(torch.randn(1, 3, 56, 56, dtype=torch.float64))


def test_parameters_on_the_meta_device_cannot_be_verified() -> None:
    with pytest.raises(RuntimeError, match=r"verify: .*meta device"):
        StepEncoder.from_timm(plain(device="meta"))
