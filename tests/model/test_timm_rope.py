"""timm's rotary positions as tables for packed tokens: those of timm's own modules, a supertoken's at its centre."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from real_timm import timm
from tensors import close
from timm_models import SMALL, build, encoder_of, pictures, rotations_of

from step_kernels import SupertokenLayout, rope_table
from step_kernels.model import StepEncoder, Trace
from step_kernels.model.from_timm.rope import turns_per_cell

GRID = (4, 6)
COUNTED = [
    {"in_pixels": False},
    {"in_pixels": False, "temperature": 100.0, "grid_offset": 0.5},
    {"in_pixels": False, "ref_feat_shape": [8, 5]},
    {"in_pixels": False, "grid_indexing": "xy", "ref_feat_shape": [8, 5]},
]
CENTRED = [
    {},
    {"temperature": 7.0, "normalize_coords": "max"},
    {"normalize_coords": "min", "grid_offset": 0.25},
    {"min_period": 0.5, "max_period": 90.0, "grid_indexing": "xy"},
]
MODULES = [
    *((timm.layers.RotaryEmbeddingCat, settings) for settings in COUNTED),
    *((timm.layers.RotaryEmbeddingDinoV3, settings) for settings in CENTRED),
]


def sines_and_cosines(table: torch.Tensor, rotate_half: bool) -> torch.Tensor:
    """A table in timm's form, every value twice."""
    halves = table.chunk(2, dim=1)
    if rotate_half:
        return torch.cat([torch.cat((half, half), 1) for half in halves], 1)
    return torch.cat([half.repeat_interleave(2, 1) for half in halves], 1)


@pytest.mark.parametrize(("make", "settings"), MODULES)
def test_tables_are_those_of_timms_modules(make: Any, settings: dict[str, Any]) -> None:
    rope = make(16, feat_shape=list(GRID), **settings)
    half = isinstance(rope, timm.layers.RotaryEmbeddingDinoV3)
    for side in (1, 2):
        layout = SupertokenLayout.uniform(1, GRID, side=side, num_prefix=2)
        table = rope_table(layout, *turns_per_cell(rope, GRID, layout.device, torch.float32))
        assert table[:2].tolist() == [[0.0] * 8 + [1.0] * 8] * 2
        expected = rotations_of(rope, GRID, (side - 1) / 2)
        corners = (layout.cells[2:, 1] * GRID[1] + layout.cells[2:, 2]).long()
        close(sines_and_cosines(table[2:], half), expected[corners], 1e-5)
    full = rope_table(SupertokenLayout.uniform(1, GRID), *turns_per_cell(rope, GRID, layout.device, torch.float32))
    close(sines_and_cosines(full, half), rope.get_embed(list(GRID)), 1e-5)


@torch.no_grad()
def test_a_dinov3_of_equal_supertokens_is_timms_on_the_small_image() -> None:
    """Area pooling and shares of the image: merging 2 x 2 everywhere is halving the image."""
    model = build("DINOv3", dynamic_img_size=True)
    images = pictures(model, 2, scale=2)
    layout = SupertokenLayout.uniform(2, (12, 16), side=2, num_prefix=model.num_prefix_tokens)
    out = encoder_of(model, merged=False)(images, replay=Trace(layout))
    close(out.tokens.view(2, -1, 64), model.forward_features(F.avg_pool2d(images, 2)), 1e-5)


def eva(**changes: Any) -> Any:
    return timm.models.Eva(**{**SMALL, "depth": 1, "img_size": 32, "use_rot_pos_emb": True, **changes})


def test_augmented_coordinates_are_refused_in_training_only() -> None:
    model = eva(rope_type="dinov3", rope_rotate_half=True)
    model.rope.rescale_coords, model.rope.aug_active = 2.0, True
    encoder, images = StepEncoder.from_timm(model.eval()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        encoder.forward_features(images)
    with pytest.raises(NotImplementedError, match=r"vit\.rope: RotaryEmbeddingDinoV3 .*at random in training"):
        encoder.train().forward_features(images)


def test_other_positions_are_refused() -> None:
    model = eva()
    model.rope = timm.layers.RotaryEmbeddingCat(32, in_pixels=True, feat_shape=[2, 2])
    with pytest.raises(NotImplementedError, match=r"vit\.rope: RotaryEmbeddingCat .*counted in patches"):
        StepEncoder.from_timm(model, verify=False)
    model = eva()
    model.blocks[0].attn.num_prefix_tokens = 0
    with pytest.raises(
        NotImplementedError, match=r"vit\.blocks\.0\.attn: EvaAttention .*expected 1 tokens without rotation"
    ):
        StepEncoder.from_timm(model, verify=False)
