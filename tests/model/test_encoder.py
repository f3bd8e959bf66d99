"""StepEncoder: equal to the dense ViT where nothing is merged, independent of batch mates, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, DIM, enlarge, photographs, small_segmenter, small_vit
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import LinearExit, PolicyNet, QuotaPolicy, StepEncoder, Trace, VariancePolicy

SIZES = [(64, 64), (8, 8), (40, 72), (37, 85), (1, 200)]


def dense_tokens(encoder: StepEncoder, images: Tensor) -> Tensor:
    out = encoder(images)
    assert out.canvas is None and out.trace.stages == ()
    return out.tokens.view(images.shape[0], -1, DIM)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_dense_vit_in_fp64(height: int, width: int, batch_size: int) -> None:
    vit = small_vit(dtype=torch.float64)
    images = photographs(batch_size, height, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(dense_tokens(StepEncoder(vit), images), vit(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_the_dense_vit_to_fp32_rounding(height: int, width: int) -> None:
    """The error against fp64 is at most twice the dense model's own (plus one ulp of the largest output)."""
    vit, truth = small_vit(), small_vit(dtype=torch.float64)
    images = photographs(2, height, width, dtype=torch.float64)
    with torch.no_grad():
        exact = truth(images)
        dense_error = (vit(images.float()) - exact).abs().max()
        error = (dense_tokens(StepEncoder(vit), images.float()) - exact).abs().max()
    assert error <= 2 * dense_error + exact.abs().max() * 2**-23


def test_gradients_equal_those_of_the_dense_vit() -> None:
    images = photographs(2, 40, 85, dtype=torch.float64)
    weights = torch.randn(2, 56, DIM, dtype=torch.float64)
    gradients = []
    for run in (lambda vit: vit(images), lambda vit: dense_tokens(StepEncoder(vit), images)):
        vit = small_vit(dtype=torch.float64)
        (run(vit) * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in vit.named_parameters()})
    for name, dense in gradients[0].items():
        assert dense is not None and dense.abs().sum() > 0, name
        torch.testing.assert_close(
            gradients[1][name], dense, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("resample", ["area", "bilinear"])
def test_merged_tokens_equal_the_dense_blocks_on_resized_patches(resample: str) -> None:
    """One image: its supertokens are an ordinary sequence for the dense blocks; pixels and positions pooled by interpolate."""
    vit = small_vit(dtype=torch.float64)
    encoder = StepEncoder(vit, VariancePolicy(0.1), resample=resample)
    images = photographs(1, 96, 124, dtype=torch.float64)
    with torch.no_grad():
        out = encoder(images)
        padded = F.pad(images, (0, 4))
        positions = vit.grid_positions((12, 16)).view(1, 12, 16, DIM).permute(0, 3, 1, 2)

        def pooled(image: Tensor, side: int) -> Tensor:
            if resample == "area":
                return F.avg_pool2d(image, side)
            return F.interpolate(image, scale_factor=1 / side, mode="bilinear") if side > 1 else image

        rows = []
        for _, row, column, side in out.layout.cells[1:].tolist():
            pixels = padded[:, :, row * 8 : (row + side) * 8, column * 8 : (column + side) * 8]
            position = pooled(positions[:, :, row : row + side, column : column + side], side)
            rows.append(vit.patch_embed(pooled(pixels, side))[0] + position.flatten(1))
        x = torch.cat([vit.prefix_tokens(), *rows])[None]
        for block in vit.blocks:
            x = block(x)
        torch.testing.assert_close(out.tokens, vit.norm(x)[0], rtol=1e-11, atol=1e-11)
    sides = out.layout.cells[1:, 3]
    assert set(sides.tolist()) == {1, 2, 4}, "the policy must have merged blocks of several sides"


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_batch_mates_do_not_matter(head: str) -> None:
    """Alone or in a batch: the same decisions, and the same numbers to the rounding of a matmul of another height."""
    encoder = small_segmenter(head, dtype=torch.float64).encoder
    images = photographs(4, 64, 88, dtype=torch.float64)
    with torch.no_grad():
        batch = encoder(images)
        starts = batch.layout.cu_seqlens.tolist()
        for number in range(4):
            alone = encoder(images[number : number + 1])
            assert torch.equal(alone.trace.layout.sides()[0], batch.trace.layout.sides()[number])
            assert torch.equal(alone.layout.sides()[0], batch.layout.sides()[number])
            own = batch.tokens[starts[number] : starts[number + 1]]
            torch.testing.assert_close(alone.tokens, own, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(alone.canvas[0], batch.canvas[number], rtol=1e-11, atol=1e-11)
    assert len(set(batch.trace.layout.lengths().tolist())) == 4, "the images must differ in length"


@pytest.mark.parametrize("policy", [PolicyNet(width=2), VariancePolicy(0.2), QuotaPolicy(VariancePolicy(0.1), 5)])
def test_every_policy_drives_the_encoder(policy: nn.Module) -> None:
    encoder = StepEncoder(small_vit(depth=1), policy)
    images = photographs(2, 61, 90)
    expected = policy(F.pad(images, (0, 6, 0, 3)), patch_size=8, num_prefix=1).trim()
    out = encoder(images)
    assert torch.equal(out.layout.cells, expected.cells) and out.layout.trimmed
    assert out.tokens.shape == (out.layout.num_tokens, DIM)


# ---------------------------------------------------------------------------------------------------------------- refusals


def exit_head(**overrides: int) -> LinearExit:
    return LinearExit(**{"dim": DIM, "num_classes": CLASSES, **overrides})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vit": nn.Identity()}, TypeError, "vit: expected a ViT, got Identity"),
        ({"policy": lambda images: None}, TypeError, "policy: expected an nn.Module or None"),
        ({"exits": [exit_head()]}, TypeError, "exits: expected a mapping from block number to exit head, got list"),
        ({"exits": {0: exit_head()}}, ValueError, "exits' block number: expected an int between 1 and 4, got 0"),
        ({"exits": {5: exit_head()}}, ValueError, "exits' block number: expected an int between 1 and 4, got 5"),
        ({"exits": {"2": exit_head()}}, TypeError, "exits' block number: expected an int"),
        ({"exits": {2: nn.Linear(DIM, 5)}}, TypeError, r"exits\[2\]: expected an ExitHead, got Linear"),
        ({"exits": {2: exit_head(dim=64)}}, ValueError, r"exits\[2\]: expected a head of width 48 as vit has, got 64"),
        ({"exits": {2: exit_head(), 3: exit_head(num_classes=7)}}, ValueError, "exits: expected heads with one number"),
        ({"resample": "nearest"}, ValueError, "resample: expected one of 'area', 'bilinear'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StepEncoder(**{"vit": small_vit(), **arguments})


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, "images: expected shape"),
        (torch.zeros(1, 1, 64, 64), ValueError, "images: expected shape"),
        (torch.zeros(0, 3, 64, 64), ValueError, "images: expected at least one image"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "images: expected torch.float32"),
        (None, TypeError, "images: expected a tensor"),
    ],
)
def test_bad_images_are_refused_by_name(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StepEncoder(small_vit(depth=1))(images)


class WrongPolicy(nn.Module):
    """Returns what it was given."""

    def __init__(self, layout: object) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int) -> object:
        return self.layout


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        (None, TypeError, "policy's layout: expected a SupertokenLayout"),
        (
            SupertokenLayout.uniform(2, (8, 8), num_prefix=1),
            ValueError,
            "expected batch size 1 as the images have, got 2",
        ),
        (SupertokenLayout.uniform(1, (8, 4), num_prefix=1), ValueError, r"expected grid \(8, 8\) as the images have"),
        (SupertokenLayout.uniform(1, (8, 8)), ValueError, "expected prefix tokens 1 as the images have, got 0"),
    ],
)
def test_a_policy_that_returns_another_layout_is_refused(layout: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StepEncoder(small_vit(depth=1), WrongPolicy(layout))(torch.zeros(1, 3, 64, 64))


def test_replay_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="replay: expected a Trace or None"):
        StepEncoder(small_vit(depth=1))(torch.zeros(1, 3, 64, 64), replay=3)  # type: ignore[arg-type]


def test_a_trace_of_a_plain_run_replays_without_a_policy() -> None:
    encoder = StepEncoder(small_vit(depth=2), VariancePolicy(0.1))
    images = photographs(2, 64, 64)
    out = encoder(images)
    replayed = StepEncoder(encoder.vit)(images, replay=Trace(out.trace.layout))
    assert torch.equal(replayed.tokens, out.tokens)


def test_exits_are_kept_in_block_order() -> None:
    first, second = exit_head(), exit_head()
    encoder = StepEncoder(enlarge(small_vit(depth=12)), exits={10: second, 2: first})
    assert list(encoder.exit_heads()) == [2, 10] and encoder.num_classes == CLASSES
    assert list(encoder.exits) == ["2", "10"] and encoder.exits["2"] is first
    with torch.no_grad():
        assert [stage.block for stage in encoder(torch.randn(1, 3, 64, 64)).trace.stages] == [2, 10]


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("other", [nn.LayerNorm(DIM + 8), nn.LayerNorm(DIM).double()])
def test_a_norm_that_does_not_fit_is_refused(gradients: type, other: nn.Module) -> None:
    """Replaced since the model was made; also where blocks leave checks out."""
    vit = small_vit()
    vit.blocks[0].norm2 = other
    with gradients(), pytest.raises((TypeError, ValueError), match="weight: expected"):
        StepEncoder(vit)(torch.zeros(1, 3, 64, 64))
