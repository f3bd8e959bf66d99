"""from_transformers refuses by name what does not run on packed tokens."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers_models import (
    DIM,
    GRID,
    SIZES,
    build,
    checkpointed,
    encoder_of,
    inputs,
    pictures,
    root_and_layers,
    transformers,
)

from step_kernels.model import StepEncoder, ViT


class MyViT(transformers.ViTModel):
    """Somebody's own."""


def small_clip() -> nn.Module:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=tiny, vision_config=tiny))


class LoraLinear(nn.Linear):
    """An adapter's layer."""


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: 3, TypeError, "model: expected a transformers model, got int 3"),
    "another model": (
        lambda: transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)),
        NotImplementedError,
        "ConvNextModel .*expected Model or Backbone",
    ),
    "a subclass": (
        lambda: MyViT(transformers.ViTConfig(**SIZES)),
        NotImplementedError,
        "MyViT .*expected Model or Backbone",
    ),
    "text beside": (
        small_clip,
        NotImplementedError,
        "CLIPModel .*pass its vision_model",
    ),
    "oblong patches": (lambda: build("ViT", patch_size=(8, 16)), NotImplementedError, "Conv2d .*square patches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        StepEncoder.from_transformers(make())


def test_what_is_put_in_later_is_refused_on_the_next_run() -> None:
    model = build("ViT")
    stand_in = StepEncoder.from_transformers(model).as_transformers()
    part = root_and_layers(model)[1][0].attention
    part, name = (part, "q_proj") if hasattr(part, "q_proj") else (part.attention, "query")  # 5.0's name
    setattr(part, name, LoraLinear(DIM, DIM).double())  # but an adapter, which is called
    with torch.no_grad():
        torch.testing.assert_close(stand_in(pictures()).last_hidden_state, model(pictures()).last_hidden_state)
    model = build("ViT")
    stand_in = StepEncoder.from_transformers(model).as_transformers()
    layer = root_and_layers(model)[1][1]
    layer.register_forward_hook(lambda *_: None)
    path = next(name for name, module in model.named_modules() if module is layer)
    with pytest.raises(NotImplementedError, match=rf"vit\.{re.escape(path)}: Layer .*hooks"):
        stand_in(pictures())


def test_an_older_transformers_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("ViT")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(NotImplementedError, match=r"ViTModel .*expected transformers >= 5, got 4\.57\.1"):
        StepEncoder.from_transformers(model)


@pytest.mark.parametrize(
    ("family", "arguments", "error", "message"),
    [
        ("DINOv2", {"attention_mask": torch.ones(3, 37)}, NotImplementedError, "attention_mask: expected None"),
        ("DINOv2", {"bool_masked_pos": torch.ones(3, 36)}, NotImplementedError, "bool_masked_pos: expected None"),
        (
            "DINOv2",
            {"output_attentions": True},
            NotImplementedError,
            "output_attentions: expected None, .*got bool True",
        ),
        ("DINOv2", {"output_hidden_states": [1]}, TypeError, "output_hidden_states: expected a bool or None"),
        ("EoMT", {"output_hidden_states": True}, NotImplementedError, "output_hidden_states: expected False"),
        (
            "ViT",
            {"pixel_values": pictures(1, (48, 64))},
            ValueError,
            r"pixel_values: .*interpolate_pos_encoding=True, got a grid of \(6, 8\)",
        ),
        (
            "DINOv3",
            {"pixel_values": pictures(1, (7, 64))},
            ValueError,
            "images: expected at least 8 x 8 pixels, one patch",
        ),
        (
            "EoMT",
            {"pixel_values": pictures(1, (48, 64))},
            ValueError,
            "images: expected a grid of 6 x 6 patches, .*got 6 x 8",
        ),
    ],
)
@torch.no_grad()
def test_arguments_that_packed_tokens_do_not_have(
    family: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    stand_in = encoder_of(build(family)).as_transformers()
    with pytest.raises(error, match=message):
        stand_in(**{"pixel_values": pictures(), **arguments})


@torch.no_grad()
def test_siglip2_takes_one_fixed_grid() -> None:
    given = inputs("SigLIP 2", pictures(2))
    stand_in = encoder_of(build("SigLIP 2")).as_transformers()
    with pytest.raises(ValueError, match="spatial_shapes: expected one grid of 36 patches"):
        stand_in(**given | {"spatial_shapes": torch.tensor([GRID, (4, 9)])})
    given["pixel_attention_mask"][0, 35] = 0
    with pytest.raises(ValueError, match="pixel_attention_mask: expected all patches"):
        stand_in(**given)


def test_random_coordinates_dropout_of_attention_and_reentrant_checkpointing_are_refused_in_training() -> None:
    for family, changes, message in (
        ("DINOv3", {"pos_embed_rescale": 2.0}, "rope_embeddings: .*set config.pos_embed_rescale to None"),
        ("ViT", {"attention_probs_dropout_prob": 0.1}, "attn_drop: Dropout .*in training"),
    ):
        encoder = StepEncoder.from_transformers(build(family, **changes))
        with pytest.raises(NotImplementedError, match=message):
            encoder.train().hidden_states(pictures(), [1])
    model = build("ViT").train()
    checkpointed(model, {"use_reentrant": True})
    with pytest.raises(NotImplementedError, match=r"layer 0: ViTLayer .*use_reentrant=False"):
        StepEncoder.from_transformers(model, verify=False).hidden_states(pictures(), [1])


def test_positions_of_an_oblong_grid_are_not_resized() -> None:
    model = build("ViT", image_size=(48, 64))
    encoder = StepEncoder.from_transformers(model)
    with pytest.raises(
        ValueError, match="expected a grid of 6 x 8 patches, since transformers resizes square grids only"
    ):
        encoder(pictures())


def test_a_plain_vit_does_not_stand_in() -> None:
    with pytest.raises(
        TypeError, match="as_transformers: expected the encoder of a transformers model, got one of ViT"
    ):
        StepEncoder(ViT.preset("tiny", img_size=32, depth=1)).as_transformers()
