"""torch.compile(fullgraph=True) of other libraries' models in static mode."""

from __future__ import annotations

import torch
from tensors import close

from step_kernels.model import LinearDecoder, StepSegmenter


@torch.no_grad()
def test_timm() -> None:
    from timm_models import build, encoder_of, pictures

    model = build("DINOv3", torch.float32, depth=1)
    segmenter, images = StepSegmenter(encoder_of(model), LinearDecoder(64, 5)).eval(), pictures(model)
    compiled = torch.compile(segmenter, fullgraph=True, backend="aot_eager")
    close(compiled(images, static=True), segmenter(images, static=True), 1e-5)


@torch.no_grad()
def test_transformers() -> None:
    from transformers_models import DIM, build, encoder_of, pictures

    encoder, images = encoder_of(build("DINOv3", torch.float32, num_hidden_layers=1)), pictures(2, dtype=torch.float32)
    segmenter = StepSegmenter(encoder, LinearDecoder(DIM, 5)).eval()
    compiled = torch.compile(segmenter, fullgraph=True, backend="aot_eager")
    close(compiled(images, static=True), segmenter(images, static=True), 1e-5)
