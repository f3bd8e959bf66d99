"""Models of transformers on a GPU: verified there, the same states as on the CPU, one CUDA graph without host syncs."""

import pytest
import torch
from gpu.syncs import no_sync
from gpu.test_timm import on_gpu
from transformers_models import DIM, FAMILIES, build, encoder_of, pictures

from step_kernels import use_backend
from step_kernels.model import LinearDecoder, StepEncoder, StepSegmenter

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_equal_those_of_the_cpu(family):
    model, images = build(family, torch.float32), pictures(dtype=torch.float32)
    encoder = encoder_of(model, exits=True)
    depth = encoder.vit.depth
    with use_backend("reference"):  # kernels do not run on the CPU
        expected, trace = encoder.hidden_states(images, [depth])[depth], encoder(images).trace
    StepEncoder.from_transformers(model.cuda())
    found = encoder.cuda().hidden_states(images.cuda(), [depth], replay=on_gpu(trace))[depth]
    assert (found.cpu() - expected).norm() < 5e-3 * expected.norm()  # TF32 convolutions


@pytest.mark.parametrize("family", ["DINOv3, gated", "SigLIP 2"])
@torch.no_grad()
def test_static_mode_has_no_sync_and_captures(family):
    segmenter = (
        StepSegmenter(encoder_of(build(family, torch.bfloat16), exits=True), LinearDecoder(DIM, 5).bfloat16())
        .cuda()
        .eval()
    )
    images, others = (pictures(pixels=(48, 48), dtype=torch.bfloat16).flip(0, axis).cuda() for axis in (2, 3))
    captured = segmenter.capture(images)
    for batch in (images, others):
        segmenter.predict(batch, static=True)  # compiles
        with no_sync():
            labels = segmenter.predict(batch, static=True)
        assert (captured.predict(batch) == labels).float().mean() > 0.99
