"""StepSegmenter: replay, training, exits that empty images, labels; StepSegmenter's and Trace's refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, DECODERS, DIM, HEADS, NoMerge, photographs, small_segmenter, small_vit
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import (
    LinearDecoder,
    LinearExit,
    MaskTransformerDecoder,
    StepEncoder,
    StepSegmenter,
    Trace,
)

HEAD_NAMES = [None, *HEADS]


def shares(trace: Trace) -> list[float]:
    return [stage.halted.float().mean().item() for stage in trace.stages]


def force(trace: Trace, stage: int, halted: Tensor) -> Trace:
    """The trace cut after ``stage``, with other tokens halting there."""
    before = trace.stages[stage - 1].layout if stage else trace.layout
    halted = halted & (before.cells[:, 3] > 0)
    image, row, column, side = before.cells[~halted].unbind(1)
    sides = torch.zeros(before.batch_size, *before.grid, dtype=torch.int32)
    for b, r, c, s in zip(*(x.tolist() for x in (image, row, column, side)), strict=True):
        sides[b, r : r + s, c : c + s] = s
    layout = SupertokenLayout.from_sides(sides, num_prefix=before.num_prefix).trim()
    own = dataclasses.replace(trace.stages[stage], halted=halted, layout=layout)
    return Trace(trace.layout, (*trace.stages[:stage], own))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", HEAD_NAMES)
@pytest.mark.parametrize("keep_per_class", [0, 1])
def test_replay_repeats_the_free_run_bit_for_bit(head: str | None, decoder: str, keep_per_class: int) -> None:
    segmenter = small_segmenter(head, decoder, keep_per_class=keep_per_class)
    images = photographs(3, 61, 90)
    trace = segmenter.trace(images)
    if head is not None:
        assert all(0 < share < 1 for share in shares(trace)), "every exit must halt some tokens and leave some"
    with torch.no_grad():
        assert torch.equal(segmenter(images), segmenter(images, replay=trace))
    assert torch.equal(segmenter.predict(images), segmenter.predict(images, replay=trace))
    free, replayed = segmenter(images), segmenter(images, replay=trace)
    assert free.requires_grad and torch.equal(free, replayed)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_training_computes_the_same_scores_and_reaches_every_parameter(head: str | None, decoder: str) -> None:
    segmenter = small_segmenter(head, decoder, dtype=torch.float64).train()
    images = photographs(2, 64, 72, dtype=torch.float64)
    trace = segmenter.trace(images)
    assert all(0 < share < 1 for share in shares(trace)) and trace.final_layout.lengths().min() > 1
    with torch.no_grad():
        inference = segmenter(images, replay=trace)
    scores = segmenter(images, replay=trace)
    torch.testing.assert_close(scores, inference, rtol=1e-11, atol=1e-11)
    labels = torch.randint(CLASSES, (2, 8, 9))
    F.cross_entropy(scores, labels).backward()
    for name, parameter in segmenter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", HEADS)
def test_everything_halts_at_the_first_exit(head: str, decoder: str) -> None:
    """Then the map is the first head's log-probabilities on the dense model's tokens after that block."""
    vit = small_vit(dtype=torch.float64)
    segmenter = small_segmenter(head, decoder, dtype=torch.float64, threshold=0.0, policy=NoMerge(), blocks=(2, 3))
    images = photographs(2, 64, 40, dtype=torch.float64)
    trace = segmenter.trace(images)
    assert trace.stages[0].layout.lengths().tolist() == [1, 1]
    assert trace.stages[1].halted.tolist() == [False, False], "prefix tokens never halt"
    exit_head = segmenter.encoder.exits["2"]
    with torch.no_grad():
        x = torch.cat([vit.prefix_tokens().expand(2, 1, -1), vit.patch_embed(images) + vit.grid_positions((8, 5))], 1)
        x = exit_head.norm(vit.blocks[1](vit.blocks[0](x)))[:, 1:]
        if head == "linear":
            logits = exit_head.head(x)
        else:
            logits = exit_head.scale * F.cosine_similarity(x[:, :, None], exit_head.classes[None, None], dim=3)
        expected = logits.log_softmax(2).transpose(1, 2).unflatten(2, (8, 5))
        torch.testing.assert_close(segmenter(images), expected, rtol=1e-10, atol=1e-10)
    training = segmenter(images)
    torch.testing.assert_close(training, expected, rtol=1e-10, atol=1e-10)
    training.sum().backward()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", HEADS)
def test_an_image_that_empties_at_the_first_exit_leaves_the_others_alone(head: str, decoder: str) -> None:
    segmenter = small_segmenter(head, decoder, dtype=torch.float64, blocks=(1,))
    images = photographs(3, 64, 64, dtype=torch.float64)
    trace = segmenter.trace(images)
    emptied = trace.layout.cells[:, 0] == 1
    forced = force(trace, 0, trace.stages[0].halted | emptied)
    assert forced.final_layout.lengths()[1] == 1
    with torch.no_grad():
        ours, free = segmenter(images, replay=forced), segmenter(images)
    assert not ours.isnan().any()
    torch.testing.assert_close(ours[[0, 2]], free[[0, 2]], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(ours[1], free[1])
    segmenter(images, replay=forced).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in segmenter.parameters())


def test_an_exit_after_the_last_block() -> None:
    segmenter = small_segmenter(blocks=(4,))
    images = photographs(2, 64, 64)
    with torch.no_grad():
        scores = segmenter(images)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(2, 8, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (61, 90), (1, 7)])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_predict_upsamples_and_crops(head: str | None, height: int, width: int) -> None:
    segmenter = small_segmenter(head, dtype=torch.float64)
    images = photographs(2, height, width, dtype=torch.float64)
    labels = segmenter.predict(images)
    with torch.no_grad():
        scores = segmenter(images)
    size = scores.shape[2] * 8, scores.shape[3] * 8
    full = F.interpolate(scores, size, mode="bilinear", align_corners=False).argmax(1)
    assert labels.shape == (2, height, width) and labels.dtype == torch.uint8
    # Ties in fp64 are rounding noise; none of these pixels has one.
    assert torch.equal(labels.long(), full[:, :height, :width])


def test_bad_parts_are_refused_by_name() -> None:
    encoder = StepEncoder(small_vit(depth=1), exits={1: LinearExit(DIM, CLASSES)})
    with pytest.raises(TypeError, match="encoder: expected a StepEncoder, got ViT"):
        StepSegmenter(encoder.vit, LinearDecoder(DIM, CLASSES))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decoder: expected a Decoder, got Linear"):
        StepSegmenter(encoder, nn.Linear(DIM, CLASSES))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decoder: expected width 48 as the encoder has, got 64"):
        StepSegmenter(encoder, MaskTransformerDecoder(64, CLASSES))
    with pytest.raises(ValueError, match="decoder: expected 5 classes as the exits have, got 6"):
        StepSegmenter(encoder, LinearDecoder(DIM, 6))
    assert StepSegmenter(StepEncoder(small_vit(depth=1)), LinearDecoder(DIM, 6)).num_classes == 6


def test_replays_of_other_images_or_encoders_are_refused_by_name() -> None:
    segmenter, images = small_segmenter(), photographs(2, 64, 64)
    trace = segmenter.trace(images)
    first, second = trace.stages

    def refuse(replay: object, message: str, inputs: Tensor = images, model: StepSegmenter = segmenter) -> None:
        for run in (model, model.predict):
            with pytest.raises(ValueError, match=message):
                run(inputs, replay=replay)

    refuse(trace, r"replay.layout: expected batch size 1 as the images have, got 2", images[:1])
    refuse(trace, r"replay.layout: expected grid \(8, 9\) as the images have, got \(8, 8\)", photographs(2, 64, 72))
    refuse(Trace(trace.layout), r"replay: expected one stage for each exit, after blocks \[1, 3\], got .* \[\]")
    refuse(Trace(trace.layout, (second, first)), r"got stages after blocks \[3, 1\]")
    refuse(trace, r"after blocks \[\], got stages after blocks \[1, 3\]", model=small_segmenter(None))
    refuse(trace, r"after blocks \[2\], got stages after blocks \[1, 3\]", model=small_segmenter(blocks=(2,)))
    short = dataclasses.replace(second, halted=second.halted[1:])
    refuse(Trace(trace.layout, (first, short)), r"replay.stages\[1\].halted: expected shape")
    other = SupertokenLayout.uniform(2, (8, 8))
    refuse(Trace(other, trace.stages), "replay.layout: expected prefix tokens 1 as the images have, got 0")
    untrimmed = dataclasses.replace(trace.layout, trimmed=False)
    refuse(Trace(untrimmed, trace.stages), r"replay.layout: expected a trimmed layout, got one of capacity")
    nobody = dataclasses.replace(second, halted=torch.zeros_like(second.halted))
    refuse(Trace(trace.layout, (first, nobody)), "replay: expected .* survivors of the exit after block 3")
    meta = SupertokenLayout.uniform(2, (8, 8), num_prefix=1, device="meta")
    refuse(Trace(meta, trace.stages), "replay.layout: expected device cpu as the images have, got meta")


def test_wrong_types_in_a_replay_are_refused_by_name() -> None:
    segmenter, images = small_segmenter(), photographs(1, 64, 64)
    trace = segmenter.trace(images)
    with pytest.raises(TypeError, match=r"replay\.layout: expected a SupertokenLayout"):
        segmenter(images, replay=Trace(None, trace.stages))  # type: ignore[arg-type]
    numbers = dataclasses.replace(trace.stages[0], halted=trace.stages[0].halted.int())
    with pytest.raises(TypeError, match=r"replay.stages\[0\].halted: expected dtype bool"):
        segmenter(images, replay=Trace(trace.layout, (numbers, trace.stages[1])))


def test_the_encoder_is_a_module_like_any_other() -> None:
    """Hooks and modules around it see images."""
    segmenter, images = small_segmenter("linear"), photographs(2, 61, 90)
    expected = segmenter.predict(images)
    seen: list[Tensor] = []
    hook = segmenter.encoder.register_forward_pre_hook(
        lambda _, inputs: (seen.append(inputs[0]), inputs[0].float())[1:]
    )
    assert torch.equal(segmenter.predict(images), expected) and torch.equal(segmenter(images), segmenter(images))
    assert all(torch.equal(found, images) for found in seen) and len(seen) == 3
    hook.remove()

    class Wrap(nn.Module):
        def __init__(self, inner: StepEncoder) -> None:
            super().__init__()
            self.inner, self.vit = inner, inner.vit

        def forward(self, images: Tensor, **named: object) -> object:
            return self.inner(images, **named)

    segmenter.encoder = Wrap(segmenter.encoder)
    assert torch.equal(segmenter.predict(images), expected)
