"""from_transformers: real models with randomised weights give what transformers gives, merged and halted tokens what its layers give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm_models
import torch
from static_runs import faked
from tensors import close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers_models import (
    CHECKS,
    DIM,
    FAMILIES,
    PATCH,
    SIZES,
    build,
    checkpointed,
    dense_states,
    dinov2_of_timm,
    encoder_of,
    exits_of,
    inputs,
    pictures,
    randomised,
    same,
    table,
    transformers,
)

from step_kernels.model import LinearDecoder, StepEncoder, StepSegmenter, VariancePolicy, predict_windows
from step_kernels.model.foreign import blocks as foreign_blocks


@pytest.mark.parametrize("capability", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, capability: str) -> None:
    CHECKS[capability](family)


def test_the_documented_table_says_what_test_family_proves() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    shown = page.split("<!-- transformers families -->")[1].split("<!-- end of transformers families -->")[0]
    assert shown.strip() == table().strip(), "run PYTHONPATH=tests:. python tests/transformers_models.py"


BACKBONES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DINOv2": ("DINOv2", "Dinov2Backbone", {}),
    "DINOv2, raw": ("DINOv2", "Dinov2Backbone", {"apply_layernorm": False, "reshape_hidden_states": False}),
    "registers": ("DINOv2 with registers", "Dinov2WithRegistersBackbone", {}),
    "DINOv3": ("DINOv3", "DINOv3ViTBackbone", {"return_class_token": True}),
    "DINOv3, raw": ("DINOv3", "DINOv3ViTBackbone", {"apply_layernorm": False, "reshape_hidden_states": False}),
}


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_backbones(name: str) -> None:
    """The maps that the config asks for, in transformers' class; merged ones of what its layers give."""
    family, kind, changes = BACKBONES[name]
    model = build(family, kind=kind, out_indices=[0, 2, 3], **changes)
    stand_in = StepEncoder.from_transformers(model).as_transformers()
    assert (stand_in.channels, stand_in.config) == (model.channels, model.config)
    for named in ({}, {"output_hidden_states": True}):
        images = pictures(2, (50, 61))
        same(stand_in(images, **named), model(images, **named))
    same(stand_in(images, return_dict=False), model(images, return_dict=False))
    model.out_features = ["stage2"]
    encoder, images = encoder_of(model, exits=True), pictures()
    expected = dense_states(family, model, images, encoder(images).trace, 2)
    expected = (
        (model.layernorm if hasattr(model, "layernorm") else model.norm)(expected)
        if model.config.apply_layernorm
        else expected
    )
    (found,) = encoder.as_transformers()(images).feature_maps
    if model.config.reshape_hidden_states:
        found = found.flatten(2).transpose(1, 2)
    close(found, expected[:, -found.shape[1] :], 1e-5)


NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "reassemble_hidden_size": DIM}
HEADS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # where the model has its vision transformer, and what its config differs in
    "DepthAnythingForDepthEstimation": ("backbone", {**NECK, "head_hidden_size": 4, "patch_size": PATCH}),
    "DPTForDepthEstimation": (
        "backbone",
        {**NECK, "is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3], "head_in_index": -1},
    ),
    "UperNetForSemanticSegmentation": (
        "backbone",
        {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8, "auxiliary_in_channels": DIM},
    ),
    "Mask2FormerForUniversalSegmentation": (
        "model.pixel_level_module.encoder",
        {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 3, "decoder_layers": 2}
        | {"num_attention_heads": 2, "encoder_feedforward_dim": 8, "encoder_layers": 1, "dim_feedforward": 8},
    ),
    "ViTForImageClassification": ("vit", {**SIZES, "intermediate_size": 48}),
    "CLIPVisionModelWithProjection": ("vision_model", {**SIZES, "intermediate_size": 48, "projection_dim": 8}),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_models_with_their_vision_transformer_replaced(name: str) -> None:
    maker, (where, settings) = getattr(transformers, name), HEADS[name]
    if where not in ("vit", "vision_model"):
        raw = name.startswith("D")  # these reshape what they are given
        backbone = transformers.Dinov2Config(
            **SIZES, mlp_ratio=2, out_indices=[0, 1, 2, 3], reshape_hidden_states=not raw
        )
        settings = {**settings, "backbone_config": backbone}
    model = randomised(maker(maker.config_class(**settings))).eval()
    vit, images = model.get_submodule(where), pictures(2, dtype=torch.float32)
    expected = model(images)
    model.set_submodule(where, StepEncoder.from_transformers(vit).as_transformers())
    same(model(images), expected, 1e-4)
    model.set_submodule(where, StepEncoder.from_transformers(vit, VariancePolicy(0.1)).as_transformers())
    merged = model(images)
    assert type(merged) is type(expected)
    for key in expected:
        if isinstance(expected[key], Tensor):
            assert merged[key].shape == expected[key].shape and not torch.allclose(
                merged[key], expected[key], atol=1e-3
            )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "EoMT"])
def test_gradients_reach_the_models_own_parameters(family: str) -> None:
    """In training mode, with transformers' gradient checkpointing on."""
    model = build(family).train()
    given, gradients = inputs(family, pictures(2)), []
    encoder = StepEncoder.from_transformers(model, verify=False)
    assert encoder.training and {id(p) for p in model.parameters()} == {id(p) for p in encoder.parameters()}
    checkpointed(model)
    layer = encoder.vit.layers[1]
    seen: list[Any] = []
    own = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *args, **named: (seen.append(args), own(*args, **named))[1]
    layer._gradient_checkpointing_func.keywords = own.keywords
    for run in (model, encoder.as_transformers()):
        seen.clear()
        run(**given).last_hidden_state.square().sum().backward()
        assert len(seen) == 1
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, expected in gradients[0].items():
        assert (expected is None) == (gradients[1][name] is None), name
        if expected is not None:
            close(gradients[1][name], expected, 1e-4)


@torch.no_grad()
def test_eomt_trains_its_queries_on_merged_tokens() -> None:
    """Labels go to the model's own loss; nothing merged, it is the same."""
    model = build("EoMT", torch.float32)
    stand_in = StepEncoder.from_transformers(model, verify=False).as_transformers()
    labels = {"mask_labels": [torch.ones(1, 48, 48)], "class_labels": [torch.tensor([1])]}
    losses = []
    for run in (model, stand_in):
        torch.manual_seed(0)  # its loss draws points
        losses.append(run(pictures(1, dtype=torch.float32), **labels).loss)
    close(losses[1], losses[0], 1e-4)
    assert (
        len(model.layers) == 3 and model.num_hidden_layers == 3 and type(model.embeddings).__name__ == "EomtEmbeddings"
    )


@torch.no_grad()
def test_drop_path_drops_the_branches_of_whole_images() -> None:
    model = build("DINOv2", drop_path_rate=0.5, num_hidden_layers=1)
    (layer,) = model.encoder.layer
    projection = getattr(layer.attention, "o_proj", None) or layer.attention.output.dense  # 5.0's name
    for tensor in (layer.mlp.fc2.weight, layer.mlp.fc2.bias, projection.weight, projection.bias):
        tensor.zero_()
    encoder, images = encoder_of(model).train(), pictures(6)
    plain = encoder.hidden_states(images, [1])[1]
    projection.bias.fill_(1.0)
    added = (encoder.hidden_states(images, [1])[1] - plain) / layer.layer_scale1.lambda1
    assert {round(float(image.mean()), 6) for image in added} == {0.0, 2.0} and added.flatten(1).std(1).max() < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_host_reads_no_value(family: str) -> None:
    """Static mode on fake tensors, which have none to read. Exact mode reads its counts, so the test can fail."""
    segmenter = StepSegmenter(encoder_of(build(family, torch.float32), exits=True), LinearDecoder(DIM, 5)).eval()
    mode = FakeTensorMode()
    fake, images = faked(segmenter, mode), mode.from_tensor(pictures(2, dtype=torch.float32))
    with mode:
        assert fake.predict(images, static=True).shape == (2, 48, 48)
        with pytest.raises(DataDependentOutputException):
            fake(images)


@torch.no_grad()
def test_a_segmenters_labels_cover_pictures_whose_grid_was_cut() -> None:
    """6 x 7 cells of 8 pixels, stretched over 50 x 61, as transformers' heads do it."""
    encoder, images = encoder_of(build("DINOv2 with registers"), exits=True), pictures(2, (50, 61))
    segmenter = StepSegmenter(encoder, LinearDecoder(DIM, 5).double()).eval()
    scores, labels = segmenter(images), segmenter.predict(images)
    assert scores.shape == (2, 5, 6, 7)
    stretched = nn.functional.interpolate(scores, (50, 61), mode="bilinear", align_corners=False).argmax(1)
    assert labels.shape == (2, 50, 61) and (labels == stretched).float().mean() > 0.999
    sums = torch.zeros(2, 5, 50, 61, dtype=torch.float64)
    for left in (0, 30, 31):  # windows of 50 x 30 pixels, 6 x 3 cells
        crop = segmenter(images[:, :, :, left : left + 30])
        sums[:, :, :, left : left + 30] += nn.functional.interpolate(
            crop, (50, 30), mode="bilinear", align_corners=False
        )
    assert (predict_windows(segmenter, images, (50, 30)) == sums.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    """Verified in the model's dtype; no further from fp64 than twice as far as transformers' own."""
    for family in ("DINOv2", "DINOv3"):
        model, truth = build(family, dtype), build(family)
        truth.load_state_dict(model.state_dict())
        images = pictures(2, dtype=dtype)
        exact = truth(images.double()).last_hidden_state
        ours, theirs = (
            run(images).last_hidden_state.double() - exact
            for run in (StepEncoder.from_transformers(model).as_transformers(), model)
        )
        assert ours.norm() <= 2 * theirs.norm()


def test_the_model_is_left_alone() -> None:
    model = build("CLIP").train()
    state, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    encoder = StepEncoder.from_transformers(model, VariancePolicy(0.1))
    assert encoder.training and all(module.training for module in model.modules())
    with torch.no_grad():
        encoder.eval().as_transformers()(pictures())
    assert [type(module) for module in model.modules()] == types and not any(
        "forward" in vars(module) for module in model.modules()
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lost", ["layer_scale", "projections"])
def test_verify_sees_another_network(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = build("DINOv3"), foreign_blocks.projections
    wrong = {
        "layer_scale": lambda *_: None,
        "projections": lambda *args: [(rows.flip(1), heads) for rows, heads in real(*args)],
    }
    monkeypatch.setattr(foreign_blocks, lost, wrong[lost])
    with pytest.raises(
        RuntimeError, match="verify: expected transformers's own features, got others: DINOv3ViTModel differs"
    ):
        StepEncoder.from_transformers(model)


@torch.no_grad()
def test_one_dinov2_through_timm_and_transformers() -> None:
    """The same weights: the same features, merged and halted too, once timm's positions are resized as transformers resizes them."""
    model = timm_models.build("DINOv2", img_size=(84, 84))
    images, exits = pictures(3, (84, 112)), exits_of(64, torch.float64)
    policy = VariancePolicy(0.1)
    by_timm = StepEncoder.from_timm(model, policy, exits, position_rule="plain bicubic").eval()
    ours = StepEncoder.from_transformers(dinov2_of_timm(model), policy, exits).eval()
    assert all(stage.halted.any() for stage in ours(images).trace.stages)
    close(ours.forward_features(images), by_timm.forward_features(images), 1e-6)
    own = images[:, :, :, :84]
    close(
        StepEncoder.from_transformers(ours.vit.model).as_transformers()(own).pooler_output,
        model.forward_features(own)[:, 0],
        1e-6,
    )
