"""timm models in static mode: no value is read by the host; their FLOPs are counted."""

from __future__ import annotations

import math

import pytest
import torch
from static_runs import faked
from timm_models import FAMILIES, build, encoder_of, pictures
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from step_kernels.model import LinearDecoder, StepSegmenter, count_flops


def segmenter_of(family: str) -> tuple[StepSegmenter, torch.Tensor]:
    model = build(family, torch.float32)
    segmenter = StepSegmenter(encoder_of(model, exits=True), LinearDecoder(64, 5)).eval()
    return segmenter, pictures(model, 2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_host_reads_no_value(family: str) -> None:
    """Fake tensors have none to read. That the test can fail, and replays, test_static.py shows of the same encoder."""
    segmenter, images = segmenter_of(family)
    mode = FakeTensorMode()
    fake, inputs = faked(segmenter, mode), mode.from_tensor(images)
    with mode:
        assert fake.predict(inputs, static=True).shape == (2, *images.shape[2:])
        features = fake.encoder.forward_features(inputs, static=True)
        assert features.shape == (2, math.prod((6, 8)) + fake.encoder.vit.num_prefix, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_linear_layers_and_of_attention(family: str) -> None:
    """Every linear layer of a block sees every token once."""
    segmenter, images = segmenter_of(family)
    model = segmenter.encoder.vit.model
    seen: list[int] = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, x, out: seen.append(2 * x[0].shape[:-1].numel() * layer.weight.numel())
        )
        for layer in model.blocks.modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        length = model.forward_features(images).shape[1]
    fused = (
        2
        * 2
        * length
        * sum(b.attn.qkv.weight.numel() for b in model.blocks if getattr(b.attn, "q_bias", None) is not None)
    )
    for hook in hooks:
        hook.remove()
    attention = sum(2 * 4 * length**2 * block.attn.proj.in_features for block in model.blocks)
    count = count_flops(segmenter, images.shape)
    assert count.blocks == sum(seen) + fused + attention > 0  # EVA's fused layer is not called: only its weight is read
    assert count.embed == 2 * 2 * 48 * model.patch_embed.proj.weight.numel()
