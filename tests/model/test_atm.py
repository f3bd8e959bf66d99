"""ATM exits and decoder: equal to a masked dense computation of the same, in both modes and in training; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_atm import atm, dense_segment, expected_halting
from small_models import CLASSES, DIM, NoMerge, photographs, small_atm_segmenter, small_vit
from static_runs import UndefinedTails, assert_same_run, decided, every_other, everybody, nobody, of_image, run
from tensors import close
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from step_kernels import SupertokenLayout
from step_kernels.model import (
    AtmDecoder,
    AtmExit,
    CosineExit,
    LinearDecoder,
    LinearExit,
    MaskTransformerDecoder,
    StepEncoder,
    StepSegmenter,
    count_flops,
)
from step_kernels.model.flops import counted
from step_kernels.model.heads.atm import predictions

EXACT = 1e-10  # fp64: two heads of some 20 matmuls and norms on four blocks, amplified by the redrawn weights
SIZES = {"depth": 2, "num_heads": 3}
FORCED = {
    "free": None,
    "none halt": {1: nobody, 3: nobody},
    "all halt at once": {1: everybody, 3: everybody},
    "only prefix tokens of one image left": {1: of_image(1), 3: every_other},
    "all halt at the last exit": {1: every_other, 3: everybody},
}
LAST_LAYER = "encoder.exits.2.head.decoder.layers.1."
ONLY_DECIDES = ("multihead_attn.v", "multihead_attn.proj", "linear", "norm2", "norm3")


def images_of(batch_size: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return photographs(batch_size, 56, 64, dtype=dtype)


# Against the dense computation


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("name", FORCED)
def test_equals_the_masked_dense_computation(name: str, merges: bool) -> None:
    segmenter, images = small_atm_segmenter(dtype=torch.float64, policy=None if merges else NoMerge()), images_of()
    trace = segmenter.trace(images)
    if FORCED[name] is not None:
        trace = decided(trace.layout, FORCED[name])
    else:
        assert all(stage.halted.any() and stage.layout.lengths().min() > 1 for stage in trace.stages)
    with torch.no_grad():
        expected, _ = dense_segment(segmenter, images, trace)
    exact = run(segmenter, images, replay=trace)
    close(exact.scores, expected, EXACT)
    upsampled = F.interpolate(expected, images.shape[2:], mode="bilinear", align_corners=False)
    assert torch.equal(exact.labels.long(), upsampled.argmax(1)), "in fp64 nothing ties but by rounding"
    assert exact.labels.unique().numel() > 2
    with UndefinedTails() as tails:
        static = run(segmenter, images, replay=trace, static=True)
    assert_same_run(static, exact)
    assert tails.poisoned.keys() >= {"class_attention", "ragged_linear", "ragged_layer_norm", "gather_tokens"}


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_decides_by_the_largest_prediction(keep: int) -> None:
    """And keeps the best of each image and class; free-running, in both modes."""
    segmenter, images = small_atm_segmenter(dtype=torch.float64, keep_per_class=keep), images_of()
    free = run(segmenter, images)
    with torch.no_grad():
        _, stages = dense_segment(segmenter, images, free.trace)
    for stage, decision in zip(stages, free.trace.stages, strict=False):
        confidence = stage.predictions.amax(2)
        assert (confidence - 0.5).abs().min() > 1e-6 and (confidence > 0.5)[stage.present].any()
        assert decision.halted.tolist() == expected_halting(stage, 0.5, keep).tolist()
    assert any(decision.halted.any() for decision in free.trace.stages)
    with UndefinedTails():
        assert_same_run(run(segmenter, images, static=True), free)


def test_without_exits_the_decoder_is_segvits_head() -> None:
    segmenter, images = small_atm_segmenter(dtype=torch.float64, blocks=()), images_of()
    trace = segmenter.trace(images)
    exact = run(segmenter, images)
    expected, (stage,) = dense_segment(segmenter, images, trace)
    close(exact.scores, expected, EXACT)
    with UndefinedTails():
        assert_same_run(run(segmenter, images, static=True), exact)
    encoded = segmenter.encoder(images)
    of_tokens, layout = segmenter.decoder(encoded.tokens, encoded.layout)
    close(of_tokens, stage.predictions[stage.present], EXACT)
    assert layout is encoded.layout


def test_an_image_without_any_token() -> None:
    """No CLS token, all halted before: queries that attend to nothing, no NaN, and no harm to the others."""
    layout = SupertokenLayout(
        torch.tensor([0, 4, 4, 8], dtype=torch.int32),
        torch.cat([SupertokenLayout.uniform(3, (2, 2)).cells[i : i + 4] for i in (0, 8)]),
        (2, 2),
        0,
        True,
    )
    head, tokens = small_atm_segmenter(dtype=torch.float64).encoder.exits["1"], torch.randn(8, DIM).double()
    tokens.requires_grad_()
    masks, class_logits = head.masks_and_classes(tokens, layout)
    both = SupertokenLayout.uniform(2, (2, 2))
    of_both, logits_of_both = head.masks_and_classes(tokens, both)
    close(masks, of_both)
    close(class_logits[[0, 2]], logits_of_both)
    (masks.sum() + class_logits.sum()).backward()
    assert class_logits.isfinite().all() and tokens.grad.isfinite().all()


# Training


def test_gradients_are_those_of_the_dense_computation() -> None:
    segmenter, images = small_atm_segmenter(dtype=torch.float64, blocks=(2,)).train(), images_of(2)
    trace = segmenter.trace(images)
    assert 0 < trace.stages[0].halted.double().mean() < 1
    scores = segmenter(images, replay=trace)
    with torch.no_grad():
        close(scores, segmenter(images, replay=trace), EXACT)
    dense, _ = dense_segment(segmenter, images, trace)
    names, parameters = zip(*segmenter.named_parameters(), strict=True)
    weights = torch.randn_like(scores)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True) for x in (scores, dense))
    for name, mine, expected in zip(names, ours, theirs, strict=True):
        if expected is None:  # the exit's last steps lead to its class weights, which decide and reach no cell
            assert mine is None or not mine.any(), name
            assert name.startswith(("encoder.exits.2.head.class_embed", LAST_LAYER)), name
            assert name.removeprefix(LAST_LAYER).startswith(ONLY_DECIDES) or "class_embed" in name, name
        else:
            assert mine is not None and expected.abs().sum() > 0, name
            close(mine, expected, EXACT)


def test_a_loss_on_masks_and_classes_reaches_the_whole_exit() -> None:
    exit_head, layout = small_atm_segmenter().encoder.exits["1"], SupertokenLayout.uniform(2, (4, 4), num_prefix=1)
    masks, class_logits = exit_head.masks_and_classes(torch.randn(34, DIM), layout)
    assert masks.shape == (34, CLASSES) and class_logits.shape == (2, CLASSES, 2)
    (masks.square().mean() + class_logits.softmax(2)[..., 0].log().sum()).backward()
    for name, parameter in exit_head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# What a run costs, computes in and reads


def test_flops_are_those_of_the_dense_head() -> None:
    """But for the queries before they see a token: those are one image's for all."""
    segmenter = small_atm_segmenter()
    first, decoder = segmenter.encoder.exits["1"], segmenter.decoder
    layer, queries = first.head.decoder["layers"][0], torch.randn(1, CLASSES, DIM // 2)
    shared = counted(lambda: (layer.self_attn(queries, queries, queries), layer.multihead_attn.q(queries)))[0]
    for images, length in ((1, 1), (1, 30), (2, 30), (3, 7)):
        x, left = torch.randn(images, length, DIM), torch.ones(images, length, dtype=torch.bool)
        dense, _ = counted(atm, first.head, x, left, x)
        tokens, layout = x.flatten(0, 1), SupertokenLayout.uniform(images, (1, length))
        assert counted(first.masks_and_classes, tokens, layout)[0] == dense - (images - 1) * shared > 0
        assert counted(decoder, tokens, layout)[0] == dense - (images - 1) * shared
    pictures = images_of(dtype=torch.float32)
    trace = segmenter.trace(pictures)
    count = count_flops(segmenter, pictures.shape, trace)
    assert min(count.blocks, count.exits, count.decoder) > 0
    assert count.total == counted(segmenter, pictures, trace)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_are_fp32_in_half_precision(dtype: torch.dtype) -> None:
    """Sigmoids near 1 are equal in half precision, although the mask logits are not."""
    masks = torch.tensor([[9.0, 10.0, 11.0, 12.0]], dtype=dtype)
    assert masks.sigmoid().unique().numel() < 4
    assert predictions(torch.ones(1, 1), masks).diff().gt(0).all()
    segmenter, images = small_atm_segmenter(dtype=dtype), images_of(dtype=dtype)
    head, layout = segmenter.encoder.exits["1"], SupertokenLayout.uniform(2, (4, 4), num_prefix=1)
    tokens = torch.randn(34, DIM).to(dtype)
    with torch.no_grad():
        masks, class_logits = head.masks_and_classes(tokens, layout)
        assert masks.dtype == class_logits.dtype == dtype
        weights = class_logits.float().softmax(2)[..., 0].repeat_interleave(17, 0)
        canvas = torch.zeros(2, CLASSES, 4, 4, dtype=dtype)
        confidence = head.halt(tokens, layout, canvas=canvas).confidence.view(2, 17)
        expected = (weights * masks.float().sigmoid()).amax(1).view(2, 17)
        torch.testing.assert_close(confidence[:, 1:], expected[:, 1:], rtol=1e-6, atol=0)
        scores = segmenter(images)
    assert scores.dtype == torch.float32 and scores.isfinite().all()


@torch.no_grad()
def test_the_host_reads_no_value() -> None:
    """Fake tensors have none to read. Exact mode reads its counts, so the test can fail."""
    segmenter, images = small_atm_segmenter(), images_of(2, torch.float32)
    counts = segmenter.trace(images).token_counts()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = mode.from_tensor(images)
        for named in ({}, {"expected_tokens": counts}):
            found = run(segmenter, inputs, static=True, **named)
            assert found.scores.shape == (2, CLASSES, 7, 8) and found.labels.shape == (2, 56, 64)
        with pytest.raises(DataDependentOutputException):
            segmenter.predict(inputs)


def test_ignores_autocast() -> None:
    segmenter, images = small_atm_segmenter(), images_of(2, torch.float32)
    plain = run(segmenter, images)
    encoded = segmenter.encoder(images)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(run(segmenter, images).scores, plain.scores)
        masks, class_logits = segmenter.decoder.head(encoded.tokens, encoded.layout)
        assert masks.dtype == class_logits.dtype == torch.float32


# Names, defaults and refusals


def test_names_of_the_parameters() -> None:
    """DToP's, so that its head's state dict fits."""
    layer = [
        "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias",
        *(f"multihead_attn.{part}.{kind}" for part in ("q", "k", "v", "proj") for kind in ("weight", "bias")),
        *(f"{part}.{kind}" for part in ("linear1", "linear2", "norm1", "norm2", "norm3") for kind in ("weight", "bias")),
    ]  # fmt: skip
    outer = ["input_proj", "proj_norm", "class_embed"]
    expected = {"q.weight", *(f"{part}.{kind}" for part in outer for kind in ("weight", "bias"))}
    expected |= {f"decoder.layers.{number}.{name}" for number in range(3) for name in layer}
    for part in (AtmExit(DIM, CLASSES), AtmDecoder(DIM, CLASSES)):
        assert {f"head.{name}" for name in expected} == {name for name, _ in part.named_parameters()}
        assert part.state_dict().keys() - {"threshold"} == {f"head.{name}" for name in expected}
    assert set(AtmExit(DIM, CLASSES).state_dict()) - set(AtmDecoder(DIM, CLASSES).state_dict()) == {"threshold"}


def test_default_sizes_are_dtops() -> None:
    """ViT-L: 512 channels, 8 heads; ViT-B: 384 and 6; three layers, five tokens of each class kept, threshold 0.95."""
    for dim, width, heads in ((1024, 512, 8), (768, 384, 6)):
        with torch.device("meta"):
            exit_head = AtmExit(dim, 150)
        layers = exit_head.head.decoder["layers"]
        assert exit_head.head.class_embed.in_features == width and len(layers) == 3
        assert {layer.self_attn.num_heads for layer in layers} == {heads}
        assert {layer.multihead_attn.num_heads for layer in layers} == {heads}
        assert layers[0].linear1.out_features == 4 * width and layers[0].norm1.eps == 1e-5
    assert exit_head.keep_per_class == 5
    assert AtmExit(DIM, CLASSES).threshold.item() == torch.tensor(0.95).item()


@pytest.mark.parametrize("kind", [AtmExit, AtmDecoder])
def test_bad_sizes_are_refused_by_name(kind: Any) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"depth": 0}, ValueError, "depth"),
        ({"depth": 1.0}, TypeError, "depth"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"width": 0}, ValueError, "width"),
        ({"width": 25, "num_heads": 3}, ValueError, "width: expected a multiple of num_heads=3, got 25"),
    ]
    for named, error, message in cases:
        with pytest.raises(error, match=message):
            kind(DIM, CLASSES, **named)
    with pytest.raises(ValueError, match="num_classes"):
        kind(DIM, 0)


def test_two_scales_never_meet() -> None:
    atm, linear, cosine = AtmExit(DIM, CLASSES, **SIZES), LinearExit(DIM, CLASSES), CosineExit(DIM, CLASSES)
    for other in (linear, cosine):
        with pytest.raises(ValueError, match="exits: expected heads that write one scale, all of them AtmExit or none"):
            StepEncoder(small_vit(), exits={1: atm, 2: other})
        with pytest.raises(ValueError, match=r"writes log-probabilities as exits\[2\], \w+Exit, does, got AtmDecoder"):
            StepSegmenter(StepEncoder(small_vit(), exits={2: other}), AtmDecoder(DIM, CLASSES, **SIZES))
    for decoder in (LinearDecoder(DIM, CLASSES), MaskTransformerDecoder(DIM, CLASSES)):
        with pytest.raises(ValueError, match=r"decoder: expected one that writes mask logits as exits\[1\], AtmExit"):
            StepSegmenter(StepEncoder(small_vit(), exits={1: atm}), decoder)
