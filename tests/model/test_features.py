"""Dense features of the package's own ViT; those of timm models are tested with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import DIM, photographs, small_segmenter, small_vit
from tensors import close

from step_kernels.model import LinearExit, StepEncoder, VariancePolicy


@torch.no_grad()
def test_features_equal_the_dense_vits() -> None:
    vit = small_vit(dtype=torch.float64)
    images = photographs(2, 40, 85, dtype=torch.float64)
    encoder = StepEncoder(vit)
    expected = vit(images)
    close(encoder.forward_features(images), expected)
    features, maps = encoder.forward_intermediates(images, norm=True)
    close(features, expected)
    assert len(maps) == 4 and maps[0].shape == (2, DIM, 5, 11)
    close(maps[-1], expected[:, 1:].transpose(1, 2).unflatten(2, (5, 11)))


@torch.no_grad()
def test_every_covered_cell_holds_its_token() -> None:
    """Also where an image lost all its tokens, and differentiably: halted tokens keep what they were at their exit."""
    encoder = small_segmenter("linear", threshold=0.3).encoder
    images = photographs(3, 64, 64)
    out = encoder(images)
    features = encoder.forward_features(images, replay=out.trace)
    sides = out.trace.layout.sides()
    assert (sides > 1).any() and any(stage.halted.any() for stage in out.trace.stages)
    first, column = torch.where(sides[0] == 2)[0][0], torch.where(sides[0] == 2)[1][0]
    grid = features[0, 1:].view(8, 8, DIM)
    assert torch.equal(grid[first, column], grid[first + 1, column + 1])
    starts = out.layout.cu_seqlens[:-1].long()
    assert torch.equal(features[:, 0], out.tokens[starts])
    for row, (image, top, left, side) in enumerate(out.layout.cells.tolist()):
        if side:
            assert torch.equal(features[image, 1 + top * 8 + left], out.tokens[row])


def test_features_are_differentiable() -> None:
    encoder = StepEncoder(small_vit(depth=2), VariancePolicy(0.1))
    features, maps = encoder.forward_intermediates(photographs(2, 64, 64), indices=[0])
    (features.sum() + maps[0].square().sum()).backward()
    missing = [name for name, parameter in encoder.vit.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize("method", ["forward_features", "forward_intermediates"])
def test_static_mode_is_for_inference(method: str) -> None:
    encoder = StepEncoder(small_vit(depth=1))
    with pytest.raises(RuntimeError, match="static mode is for inference"):
        getattr(encoder, method)(photographs(1, 64, 64), static=True)


@pytest.mark.parametrize(
    "indices",
    [[0, 2], (0, -1), range(0, 3, 2), {2, 0}, iter([0, 2]), torch.tensor([0, 2]), np.array([0, -1]), [np.int64(0), 2]],
    ids=lambda indices: type(indices).__name__,
)
@torch.no_grad()
def test_indices_of_any_kind(indices: Any) -> None:
    encoder, images = StepEncoder(small_vit(depth=3)), photographs(1, 32, 32)
    every = encoder.forward_intermediates(images, intermediates_only=True)
    maps = encoder.forward_intermediates(images, indices, intermediates_only=True)
    assert len(maps) == 2 and torch.equal(maps[0], every[0]) and torch.equal(maps[1], every[2])
    (last,) = encoder.forward_intermediates(images, torch.tensor(1), intermediates_only=True)
    assert torch.equal(last, every[2])


@torch.no_grad()
def test_a_replayed_mask_fits_after_the_last_block_too() -> None:
    encoder = StepEncoder(small_vit(depth=2), exits={2: LinearExit(DIM, 5)})
    images = photographs(1, 32, 32)
    trace = encoder(images).trace
    (stage,) = trace.stages
    odd = replace(trace, stages=(replace(stage, halted=~stage.halted),))
    for method in (encoder.forward_features, encoder.forward_intermediates):
        method(images, replay=trace)
        with pytest.raises(ValueError, match=r"replay: expected .* survivors of the exit after block 2"):
            method(images, replay=odd)
