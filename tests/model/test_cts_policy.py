"""CTS-Segmenter checkpoints and their policy, EfficientNet-Lite0 by timm itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoint_cases import CLASSES, DEPTH, DIM, HEADS, INFO, draw, save_segmenter, segmenter_shapes, variant
from checkpoint_forwards import cts_logits
from real_timm import timm
from small_models import photographs
from torch import Tensor

from step_kernels.model import (
    CTSPolicy,
    QuotaPolicy,
    StepSegmenter,
    checkpoint_info,
    load_checkpoint,
    save_checkpoint,
)

PATCH, GRID, QUOTA = 16, (6, 4), 3
IMAGES = photographs(2, 96, 64, dtype=torch.float64)


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    """timm's network as CTS makes it, with random batch-norm statistics that keep activations apart."""
    torch.manual_seed(3)
    net = timm.create_model("efficientnet_lite0", pretrained=False, features_only=True).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.2, 0.6)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return net.double()


@pytest.fixture(scope="module")
def state(backbone: torch.nn.Module) -> dict[str, Tensor]:
    """A CTS-Segmenter state dict in fp64: Segmenter's, and 288 tensors of the policy's backbone."""
    shapes = segmenter_shapes("mask_transformer", patch=PATCH, cells=GRID[0] * GRID[1])
    head = draw({"policy_net.head.weight": (2, 320, 1, 1), "policy_net.head.bias": (2,)}, seed=5)
    head["policy_net.head.weight"] *= 0.1  # a softmax without ties
    segmenter = {name: tensor.double() for name, tensor in {**draw(shapes), **head}.items()}
    return segmenter | {f"policy_net.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}


def cts_variant(**net: object) -> str:
    text = variant("mask_transformer", image_size=(96, 64), policy_method="policy_net", **net)
    return text.replace("patch_size: 8", f"patch_size: {PATCH}")


def shares(state: dict[str, Tensor], backbone: torch.nn.Module, images: Tensor) -> Tensor:
    """CTS's policy network: [B, 2, rows / 2, cols / 2]."""
    with torch.no_grad():
        features = backbone(images)[-1]
    return F.conv2d(features, state["policy_net.head.weight"], state["policy_net.head.bias"])


def test_names_are_those_of_the_published_files(backbone: torch.nn.Module) -> None:
    names = set(backbone.state_dict())
    assert len(names) == 288
    assert {"conv_stem.weight", "bn1.running_mean", "blocks.0.0.conv_dw.weight", "blocks.6.0.conv_pwl.weight"} <= names
    policy = CTSPolicy()
    assert set(policy.state_dict()) == {f"backbone.{name}" for name in names} | {"head.weight", "head.bias"}
    assert policy.head.weight.shape == (2, 320, 1, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_cts_logits(dtype: torch.dtype, tolerance: float, state, backbone, tmp_path: Path) -> None:
    """Merged by quota, at the stored grid and at others."""
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_segmenter(tmp_path, "", cts_variant(policy_schedule=(12, QUOTA), policynet_ckpt="null"), cast)
    segmenter = load_checkpoint(tmp_path)
    assert isinstance(segmenter, StepSegmenter) and segmenter.encoder.resample == "bilinear"
    assert isinstance(segmenter.encoder.policy, QuotaPolicy) and segmenter.encoder.policy.count == QUOTA
    for pictures in (IMAGES, photographs(2, 64, 128, dtype=torch.float64, seed=1)):
        wanted = shares(state, backbone, pictures)
        margins = wanted.softmax(1)[:, 1].flatten(1).sort(descending=True).values.diff().abs()[:, QUOTA - 1]
        assert margins.min() > 1e-4, "too close to be decided alike in fp32"
        expected = cts_logits(state, pictures, wanted, heads=HEADS, patch=PATCH, grid=GRID, quota=QUOTA)
        with torch.no_grad():
            found = segmenter(pictures.to(dtype))
        assert expected.std() > 0.3
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        lengths = segmenter.trace(pictures.to(dtype)).layout.lengths()
        cells = pictures.shape[2] * pictures.shape[3] // PATCH**2
        assert lengths.tolist() == [1 + cells - 3 * QUOTA] * 2
    assert checkpoint_info(tmp_path).format == "CTS-Segmenter"


def test_a_saved_cts_model_comes_back(state, tmp_path: Path) -> None:
    save_segmenter(tmp_path / "cts", "", None, state)
    model = load_checkpoint(tmp_path / "cts", num_heads=HEADS, img_size=(96, 64), quota=QUOTA)
    again = load_checkpoint(save_checkpoint(model, tmp_path / "copy", info=INFO))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert (again.num_classes, again.encoder.vit.depth, again.encoder.vit.embed_dim) == (CLASSES, DEPTH, DIM)


def test_what_a_cts_file_must_tell(state, tmp_path: Path) -> None:
    path = save_segmenter(tmp_path, "", None, state)
    with pytest.raises(ValueError, match="quota: expected the number of 2x2 blocks to share per image"):
        load_checkpoint(path, num_heads=HEADS, img_size=(96, 64))
    (tmp_path / "variant.yml").write_text(cts_variant(policy_schedule=(12, QUOTA)))
    with pytest.raises(ValueError, match=r"quota: expected 3, as the config of .* tells, got 4"):
        load_checkpoint(path, quota=4)
    lost = {name: tensor for name, tensor in state.items() if not name.endswith("blocks.6.0.bn3.running_var")}
    with pytest.raises(ValueError, match=r"missing keys: policy_net.backbone.blocks.6.0.bn3.running_var$"):
        load_checkpoint(save_segmenter(tmp_path, "", None, lost))


def test_scores_of_odd_grids_and_half_precision(backbone) -> None:
    """The last row and column of an odd grid belong to no 2x2 block."""
    policy = CTSPolicy().eval()
    policy.backbone.load_state_dict(backbone.state_dict())
    images = photographs(1, 7 * PATCH, 5 * PATCH)
    with torch.no_grad():
        (score,) = policy.scores(images, patch_size=PATCH)
        features = policy.backbone(images)[-1]
        whole = F.conv2d(features, policy.head.weight, policy.head.bias).softmax(1)[:, 1]
        assert score.shape == (1, 3, 2) and whole.shape == (1, 4, 3)
        torch.testing.assert_close(score, whole[:, :3, :2])
        layout = policy(images, patch_size=PATCH).trim()
        assert layout.num_tokens == 35 - 3 * int((score > 0.5).sum()) < 35
        assert policy.to(torch.bfloat16).scores(images.bfloat16(), patch_size=PATCH)[0].dtype == torch.float32


def test_refusals() -> None:
    policy = CTSPolicy()
    with pytest.raises(ValueError, match="patch_size: expected 16, half of the stride of CTS's network, got 8"):
        policy.scores(torch.zeros(1, 3, 64, 64), patch_size=8)
    with pytest.raises(ValueError, match="images: expected shape"):
        policy.scores(torch.zeros(1, 4, 64, 64), patch_size=16)
    with pytest.raises(TypeError, match=r"images: expected torch\.float32"):
        policy.scores(torch.zeros(1, 3, 64, 64, dtype=torch.float64), patch_size=16)
    with pytest.raises(ValueError, match="padded to multiples"):
        policy.scores(torch.zeros(1, 3, 60, 64), patch_size=16)


def test_timm_missing_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is needed .*pip install timm, or, in .* pip install -e '\.\[timm\]'"):
        CTSPolicy()
