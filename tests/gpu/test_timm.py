"""timm models on a GPU: verified there, the same features as on the CPU, one CUDA graph without host syncs."""

import dataclasses

import pytest
import torch
from gpu.syncs import no_sync
from timm_models import build, encoder_of, pictures

from step_kernels import use_backend
from step_kernels.model import LinearDecoder, StepEncoder, StepSegmenter, Trace

pytestmark = pytest.mark.gpu

FAMILIES = ["DINOv2 registers", "AIMv2", "EVA02", "DINOv3", "DINOv3 plus"]


def on_gpu(trace: Trace) -> Trace:
    stages = (dataclasses.replace(s, halted=s.halted.cuda(), layout=s.layout.to("cuda")) for s in trace.stages)
    return Trace(trace.layout.to("cuda"), tuple(stages))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_equal_those_of_the_cpu(family):
    model = build(family, torch.float32)
    with use_backend("reference"):  # kernels do not run on the CPU
        images, encoder = pictures(model, 3), encoder_of(model, exits=True)
        expected, trace = encoder.forward_features(images), encoder(images).trace
    StepEncoder.from_timm(model.cuda())
    found = encoder.cuda().forward_features(images.cuda(), replay=on_gpu(trace))
    assert (found.cpu() - expected).norm() < 5e-3 * expected.norm()  # TF32 convolutions


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_static_mode_has_no_sync_and_captures(family):
    model = build(family, torch.bfloat16).cuda()
    segmenter = StepSegmenter(encoder_of(model, exits=True), LinearDecoder(64, 5).bfloat16()).cuda().eval()
    images, others = pictures(model, 3).cuda(), pictures(model, 3, seed=1).cuda()
    captured = segmenter.capture(images)
    for batch in (images, others):
        segmenter.predict(batch, static=True)  # compiles
        with no_sync():
            labels = segmenter.predict(batch, static=True)
        assert (captured.predict(batch) == labels).float().mean() > 0.99
