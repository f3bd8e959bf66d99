"""from_timm: real timm models with randomised weights give what timm gives, merged and halted tokens what timm's blocks give."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from real_timm import timm
from tensors import close
from timm_models import (
    CHECKS,
    CLASSES,
    FAMILIES,
    ROTARY,
    build,
    encoder_of,
    leaves,
    pictures,
    randomised,
    table,
    tolerance,
)
from torch import nn

from step_kernels.model import LinearDecoder, LinearExit, PolicyNet, StepEncoder, StepSegmenter, VariancePolicy
from step_kernels.model.foreign import blocks as foreign_blocks
from step_kernels.model.train.objective import STAGES, Objective


@pytest.mark.parametrize("capability", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, capability: str) -> None:
    CHECKS[capability](family)


def test_the_documented_table_says_what_test_family_proves() -> None:
    page = (Path(__file__).parents[2] / "docs" / "timm.md").read_text(encoding="utf-8")
    shown = page.split("<!-- timm families -->")[1].split("<!-- end of timm families -->")[0]
    assert shown.strip() == table(lambda *_: True).strip(), "run PYTHONPATH=tests:. python tests/timm_models.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_models_own_parameters(family: str) -> None:
    """Training mode, with a DropPath of each image, dropout behind the projections, and checkpointing in ours."""
    model = build(family, drop_path_rate=0.4, proj_drop_rate=0.0).train()
    encoder, images = StepEncoder.from_timm(model, verify=False), pictures(model, 4)
    assert encoder.training and {id(p) for p in model.parameters()} == {id(p) for p in encoder.parameters()}
    gradients, outputs = [], []
    for run, checkpointing in ((model.forward, False), (encoder.classify, True)):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        outputs.append(run(images))
        (outputs[-1].square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    close(outputs[1], outputs[0], tolerance(family))
    for name, expected in gradients[0].items():
        assert expected is not None and expected.abs().sum() > 0, name
        close(gradients[1][name], expected, 10 * tolerance(family))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_training_learns_its_part(stage: str) -> None:
    model = build("DINOv3", torch.float32, num_classes=0)
    encoder = StepEncoder.from_timm(model, PolicyNet((2, 4), 0.5, width=4), {1: LinearExit(64, CLASSES)})
    objective = Objective(StepSegmenter(encoder, LinearDecoder(64, CLASSES)), stage)
    learned, images = objective.learned(), pictures(model).float()
    labels = torch.randint(CLASSES, (len(images), *images.shape[2:]))
    objective.train()(images, labels)["loss"].backward()
    assert learned and all(parameter.grad is not None for parameter in learned.values())


@pytest.mark.parametrize("family", [name for name in FAMILIES if build(name, torch.float32, depth=1).dynamic_img_size])
@torch.no_grad()
def test_images_of_other_sizes(family: str) -> None:
    """Position embeddings are resized by timm's rule, which computes in fp32."""
    model = build(family)
    images = pictures(model, scale=2)[:, :, : 5 * model.patch_embed.patch_size[0]]
    encoder = encoder_of(model, merged=False)
    close(encoder.forward_features(images), model.forward_features(images), 1e-6)
    for ours, timms in zip(*(leaves(one.forward_intermediates(images)) for one in (encoder, model)), strict=True):
        close(ours, timms, 1e-6)
    model.patch_embed.dynamic_img_pad = True
    close(encoder.forward_features(images[:, :, :-3, :-5]), model.forward_features(images[:, :, :-3, :-5]), 1e-6)


@torch.no_grad()
def test_a_model_of_one_size_runs_others_as_after_set_input_size() -> None:
    model = build("AugReg")
    images = pictures(model, scale=2)
    found = encoder_of(model, merged=False).forward_features(images)
    model.set_input_size(tuple(images.shape[2:]))
    close(found, model.forward_features(images), 1e-6)


def test_dropout_behind_projections_is_applied_in_training() -> None:
    """Drawn for every element, so only means can be compared with what eval mode gives."""
    model = build("AugReg", torch.float32, proj_drop_rate=0.5, pos_drop_rate=0.2, depth=1)
    encoder, images = StepEncoder.from_timm(model), pictures(model)
    with torch.no_grad():
        first, again = encoder.forward_features(images), encoder.forward_features(images)
        assert torch.equal(first, again)
        encoder.train()
        assert not torch.equal(encoder.forward_features(images), encoder.forward_features(images))


def test_drop_path_drops_the_branches_of_whole_images() -> None:
    """Each image, merged or not, is that of a model without the branches drawn for it: alike for all of its tokens."""
    model = build("AugReg", depth=1)
    block = model.blocks[0]
    block.drop_path1 = timm.layers.DropPath(0.5)
    encoder, images = encoder_of(model).train(), pictures(model, 6)
    with torch.no_grad():
        for tensor in (block.mlp.fc2.weight, block.mlp.fc2.bias, block.attn.proj.weight, block.attn.proj.bias):
            tensor.zero_()
        plain = encoder.forward_intermediates(images, indices=1, intermediates_only=True)[0]
        block.attn.proj.bias.fill_(1.0)  # a branch of ones: 0 where dropped, 2 where kept
        out = encoder.forward_intermediates(images, indices=1, intermediates_only=True)[0]
    added = (out - plain).flatten(1)
    for image in added:
        assert torch.allclose(image, image[0]) and min(abs(float(image[0])), abs(float(image[0]) - 2)) < 1e-9
    assert len({round(float(image[0])) for image in added}) == 2


@torch.no_grad()
def test_gates_and_shared_heads_of_keys() -> None:
    """Parts that timm has and none of the families uses."""
    gated = build("AugReg", torch.float32)
    for block in gated.blocks:
        block.attn = timm.layers.Attention(
            64, num_heads=2, qkv_bias=True, qk_norm=True, gated=True, norm_layer=nn.LayerNorm
        )
    settings = {"rope_type": "dinov3", "use_rot_pos_emb": True, "rope_rotate_half": True, "attn_type": "rope"}
    size = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 3}
    grouped = timm.models.Eva(**size, **settings, qkv_fused=False, num_kv_heads=2, qk_norm=True)
    for model in (randomised(gated), randomised(grouped)):
        model, images = model.double().eval(), pictures(model).double()
        encoder = StepEncoder.from_timm(model, verify=False)
        close(encoder.forward_features(images), model.forward_features(images), 1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", ["DeiT", "DINOv3", "ViT with RoPE"])  # one for each class of attention
@torch.no_grad()
def test_attentions_scale_is_timms(family: str, fused: bool) -> None:
    """timm's fused attention ignores ``attn.scale``, its own does not."""
    model = build(family)
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = fused, 1.7 * block.attn.scale
    images = pictures(model)
    close(StepEncoder.from_timm(model).forward_features(images), model.forward_features(images), tolerance(family))


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_kept(training: bool) -> None:
    model = build("AugReg", torch.float32, depth=1).train(training)
    model.norm.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    encoder = StepEncoder.from_timm(model)
    assert encoder.training is training and {name: m.training for name, m in model.named_modules()} == modes


def test_the_original_model_is_left_alone() -> None:
    model = build("DINOv2", torch.float32)
    state, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    images = pictures(model)
    with torch.no_grad():
        expected = model(images)
        encoder = StepEncoder.from_timm(model, VariancePolicy(0.1)).eval()
        encoder.classify(images)
        assert torch.equal(model(images), expected) and torch.equal(encoder.vit(images), expected)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(vars(module).keys() & {"forward", "_tome_info"} for module in model.modules())


@torch.no_grad()
def test_a_segmenter_runs_on_it_in_both_modes() -> None:
    for family in ("DINOv2 registers", *sorted(ROTARY)):
        model = build(family, torch.float32)
        encoder = encoder_of(model, exits=True)
        segmenter = StepSegmenter(encoder, LinearDecoder(64, 5)).eval()
        images = pictures(model, 3)[:, :, :-3]
        labels, trace = segmenter.predict(images), segmenter.trace(images)
        assert torch.equal(segmenter.predict(images, replay=trace), labels)
        assert (segmenter.predict(images, replay=trace, static=True) == labels).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    """Verified in the model's dtype; no further from fp64 than twice as far as timm's own."""
    for family in ("DINOv2", *sorted(ROTARY)):
        model, truth = build(family, dtype), build(family)
        for parameter, rounded in zip(truth.parameters(), model.parameters(), strict=True):
            parameter.copy_(rounded)
        images = pictures(model)
        exact = truth.forward_features(images.double())
        ours = StepEncoder.from_timm(model).forward_features(images).double() - exact
        timms = model.forward_features(images).double() - exact
        assert ours.norm() <= 2 * timms.norm() + 1e-7 * exact.norm()


@torch.no_grad()
def test_output_dict_has_timms_keys() -> None:
    model = build("DINOv2 registers")
    images, encoder = pictures(model), encoder_of(model, merged=False)
    for settings in ({}, {"return_prefix_tokens": True}, {"intermediates_only": True}):
        ours, timms = (
            one.forward_intermediates(images, indices=2, output_dict=True, **settings) for one in (encoder, model)
        )
        assert ours.keys() == timms.keys()
        for key in ours:
            for one, other in zip(leaves(ours[key]), leaves(timms[key]), strict=True):
                close(one, other, 1e-11)


@pytest.mark.parametrize("lost", ["layer_scale", "plain_block"])
def test_verify_sees_another_network(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that leaves out a part, as one for other models might."""
    model = build("DeiT3", torch.float32)
    wrong = {"layer_scale": lambda *_: None, "plain_block": lambda block, parts, tokens, *_: tokens}
    StepEncoder.from_timm(model)
    monkeypatch.setattr(foreign_blocks, lost, wrong[lost])
    StepEncoder.from_timm(model, verify=False)
    with pytest.raises(
        RuntimeError, match="verify: expected timm's own features, got others: VisionTransformer differs"
    ):
        StepEncoder.from_timm(model)


def test_verify_takes_an_activation_at_its_word() -> None:
    """tanh-GELU is 5e-4 off exact GELU: less than verify would see, so the runner must read which one it is."""
    model = build("AugReg")
    for block in model.blocks:
        block.mlp.act.approximate = "tanh"
    with torch.no_grad():
        images = pictures(model)
        close(StepEncoder.from_timm(model).forward_features(images), model.forward_features(images), 1e-11)


@pytest.mark.parametrize("family", ["AugReg", "DeiT, distilled", "DINOv2 registers", "SigLIP"])
@torch.no_grad()
def test_an_encoder_has_what_timms_users_read(family: str) -> None:
    """timm's names, its own first parameter's too."""
    model = build(family, dynamic_img_size=True)
    images, encoder = pictures(model), encoder_of(model, merged=False)
    for name in ("embed_dim", "num_features", "num_prefix_tokens", "feature_info"):
        assert getattr(encoder, name) == getattr(model, name), name
    assert (encoder.patch_size, encoder.patch_size) == model.patch_embed.patch_size
    prefix = bool(model.num_prefix_tokens)
    for settings in ({}, {"n": [0, 2], "norm": True, "return_prefix_tokens": prefix}, {"n": 2, "reshape": True}):
        ours, timms = (leaves(one.get_intermediate_layers(x=images, **settings)) for one in (encoder, model))
        assert len(ours) == len(timms) > 0
        for one, other in zip(ours, timms, strict=True):
            close(one, other, 1e-11)
    close(encoder.forward_features(x=images), model.forward_features(x=images), 1e-11)
    close(encoder.forward_intermediates(x=images)[0], model.forward_intermediates(x=images)[0], 1e-11)
    encoder.set_grad_checkpointing()
    assert model.grad_checkpointing


@torch.no_grad()
def test_positions_by_another_rule() -> None:
    """Those that PyTorch's bicubic makes, put into a model of that size."""
    model = build("DINOv2")
    larger = build("DINOv2", img_size=(7 * 14, 9 * 14))
    grid = model.pos_embed[:, 1:].unflatten(1, (6, 8)).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, (7, 9), mode="bicubic", align_corners=False)
    larger.load_state_dict(
        {**model.state_dict(), "pos_embed": torch.cat((model.pos_embed[:, :1], resized.flatten(2).mT), 1)}
    )
    images = pictures(larger)
    encoder = StepEncoder.from_timm(model, position_rule="plain bicubic")
    close(encoder.forward_features(images), larger.forward_features(images), 1e-11)
    with pytest.raises(ValueError, match="position_rule: expected one of 'bicubic'"):
        StepEncoder.from_timm(model, position_rule="nearest")
