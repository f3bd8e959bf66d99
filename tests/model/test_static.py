"""Static mode: the results of exact mode, with nothing trimmed, nothing read from tails and nothing read by the host."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CLASSES, DECODERS, DIM, photographs, small_vit
from static_runs import (
    HEADS,
    POLICIES,
    UndefinedTails,
    assert_same_run,
    assert_same_trace,
    decided,
    every_other,
    everybody,
    faked,
    faked_trace,
    nobody,
    of_image,
    run,
    segmenter_of,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from step_kernels import SupertokenLayout
from step_kernels.model import (
    CosineExit,
    LinearExit,
    PolicyNet,
    StepEncoder,
    StepSegmenter,
    Trace,
    VariancePolicy,
)

SIZES = [(3, 61, 90), (1, 64, 40), (2, 8, 7)]  # batch, height, width
CASES = [
    *((head, keep, "variance", SIZES[0]) for head, keep in HEADS),
    (None, 0, "none", SIZES[0]),
    ("cosine", 1, "none", SIZES[0]),
    ("linear", 0, "net", SIZES[0]),
    ("cosine", 0, "net", SIZES[0]),
    ("linear", 1, "variance", SIZES[1]),
    (None, 0, "net", SIZES[2]),
]
FORCED = {
    "an image emptied at the first exit": {1: of_image(1), 3: every_other},
    "the first and the last image emptied": {1: lambda x: of_image(0)(x) | of_image(2)(x), 3: nobody},
    "all halted": {1: everybody, 3: everybody},
    "none halted": {1: nobody, 3: nobody},
    "all halted at the last exit": {1: every_other, 3: everybody},
}


def images_of(batch_size: int = 3, height: int = 61, width: int = 90) -> Tensor:
    return photographs(batch_size, height, width, dtype=torch.float64)


def padded(images: Tensor) -> Tensor:
    return nn.functional.pad(images, (0, -images.shape[3] % 8, 0, -images.shape[2] % 8))


@contextlib.contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """``torch.empty`` holds NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("head", "keep", "policy", "size"), CASES)
def test_equals_exact_mode(head: str | None, keep: int, policy: str, size: tuple[int, int, int], decoder: str) -> None:
    """Free-running and at exact mode's decisions, with tails and new memory full of NaN."""
    images = images_of(*size)
    segmenter = segmenter_of(padded(images), head, decoder, policy, keep)
    exact = run(segmenter, images)
    for stage in exact.trace.stages:
        assert stage.halted.any() and stage.layout.lengths().max() > 1, "every exit halts some and leaves some"
    full = size[0] * exact.trace.layout.max_seqlen
    assert (exact.trace.layout.capacity < full) == (policy != "none" and size != SIZES[2]), "the policy merges"
    for replay in (None, exact.trace):
        with nan_in_new_memory(), UndefinedTails() as tails:
            static = run(segmenter, images, replay=replay, static=True)
        assert_same_run(static, exact)
        assert {stage.layout.capacity for stage in static.trace.stages} <= {full} == {static.trace.layout.capacity}
        assert not any(stage.layout.trimmed for stage in static.trace.stages)
        if head or exact.trace.layout.capacity < full:
            ops = {"ragged_attention", "ragged_linear", "ragged_layer_norm"}
            assert tails.poisoned.keys() >= ops | ({"gather_tokens"} if head else set())


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_equals_exact_mode_where_images_empty(head: str, decoder: str, name: str) -> None:
    images = images_of()
    segmenter = segmenter_of(padded(images), head, decoder)
    replay = decided(segmenter.trace(images).layout, FORCED[name])
    exact = run(segmenter, images, replay=replay)
    assert_same_trace(exact.trace, replay)
    assert not exact.scores.isnan().any()
    with nan_in_new_memory(), UndefinedTails():
        assert_same_run(run(segmenter, images, replay=replay, static=True), exact)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_equals_exact_mode_where_one_image_empties_by_itself(head: str, decoder: str) -> None:
    """A threshold below all confidences of one image, above some of the others'."""
    images = images_of()
    segmenter = segmenter_of(padded(images), head, decoder)
    first = segmenter.encoder.exit_heads()[1]
    confidence = confidences(segmenter, images)
    lowest = torch.stack([of_one.min() for of_one in confidence])
    emptied = int(lowest.argmax())
    first.threshold.copy_(lowest[emptied] - 1e-4)
    exact = run(segmenter, images)
    survivors = exact.trace.stages[0].layout.lengths() - 1
    assert survivors[emptied] == 0 and survivors.sum() > 0
    with nan_in_new_memory(), UndefinedTails():
        assert_same_run(run(segmenter, images, static=True), exact)


def confidences(segmenter: StepSegmenter, images: Tensor) -> list[Tensor]:
    """Of each image's tokens at the first exit."""
    head, found = segmenter.encoder.exit_heads()[1], []
    decide = head.halt

    def halt(tokens: Tensor, layout: SupertokenLayout, **named: Any) -> Any:
        halting = decide(tokens, layout, **named)
        real = layout.cells[:, 3] > 0
        found.extend(halting.confidence[real & of_image(b)(layout)] for b in range(layout.batch_size))
        return halting

    head.halt = halt  # type: ignore[method-assign]
    try:
        segmenter.trace(images)
    finally:
        del head.halt
    return found


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_poisoned_halting_mask_changes_nothing(decoder: str) -> None:
    """A replayed mask may hold anything past the live count."""
    images = images_of()
    segmenter = segmenter_of(padded(images), decoder=decoder)
    exact = run(segmenter, images)
    stages, before = [], exact.trace.layout
    for stage in exact.trace.untrim().stages:
        halted = stage.halted.clone()
        halted[before.num_tokens :] = True
        stages.append(dataclasses.replace(stage, halted=halted))
        before = stage.layout
    assert all(stage.halted[-1] for stage in stages)
    replay = Trace(exact.trace.layout.trim(), tuple(stages)).untrim()
    assert_same_run(run(segmenter, images, replay=replay, static=True), exact)


def test_leaves_autocast_and_inference_mode_alone() -> None:
    images = images_of()
    segmenter = segmenter_of(padded(images))
    exact = run(segmenter, images)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_same_run(run(segmenter, images, static=True), exact)


@pytest.mark.parametrize("expected", [(0, 0, 0), (10**9, 7, 1)])
def test_expected_counts_change_nothing_and_reach_the_layouts(expected: tuple[int, ...]) -> None:
    images = images_of()
    segmenter = segmenter_of(padded(images), "cosine")
    exact = run(segmenter, images)
    counts = exact.trace.token_counts()
    assert counts == tuple(x.num_tokens for x in (exact.trace.layout, *(s.layout for s in exact.trace.stages)))
    assert counts[0] > counts[1] > counts[2]
    for hint in (expected, counts):
        static = run(segmenter, images, static=True, expected_tokens=hint)
        assert_same_run(static, exact)
        layouts = [static.trace.layout, *(stage.layout for stage in static.trace.stages)]
        assert tuple(layout.expected_tokens for layout in layouts) == hint
        assert static.trace.token_counts() == counts
    assert run(segmenter, images, static=True).trace.layout.expected_tokens is None


# Traces


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head", [None, "linear"])
def test_traces_lead_from_one_mode_to_the_other(head: str | None, policy: str, tmp_path: Path) -> None:
    images = images_of()
    segmenter = segmenter_of(padded(images), head, policy=policy)
    exact, static = run(segmenter, images), run(segmenter, images, static=True)
    assert_same_trace(exact.trace.trim(), exact.trace)
    torch.save(exact.trace, tmp_path / "exact.pt")
    assert_same_trace(torch.load(tmp_path / "exact.pt"), exact.trace)
    for untrimmed in (exact.trace.untrim(), static.trace.untrim()):
        full = 3 * untrimmed.layout.max_seqlen
        for layout in (untrimmed.layout, *(stage.layout for stage in untrimmed.stages)):
            layout.validate()
            assert layout.capacity == full and not layout.trimmed
        assert all(stage.halted.shape == (full,) for stage in untrimmed.stages)
        assert_same_trace(untrimmed.untrim(), untrimmed)
        assert_same_trace(untrimmed.trim(), exact.trace)
        torch.save(untrimmed, tmp_path / "trace.pt")
        loaded = torch.load(tmp_path / "trace.pt")
        assert_same_trace(loaded, untrimmed)
        assert_same_run(run(segmenter, images, replay=loaded, static=True), exact)
        assert_same_run(run(segmenter, images, replay=loaded.trim()), exact)
    assert_same_run(run(segmenter, images, replay=static.trace.trim()), exact)


# Nothing is read by the host


def two_kinds_of_exits(policy: nn.Module | None, decoder: str, keep: int = 1) -> StepSegmenter:
    exits = {1: LinearExit(DIM, CLASSES, 0.6, keep), 3: CosineExit(DIM, CLASSES, 0.3)}
    return StepSegmenter(StepEncoder(small_vit(), policy, exits), DECODERS[decoder](DIM, CLASSES)).eval()


@pytest.mark.parametrize(
    ("decoder", "policy"), [("linear", VariancePolicy(0.1)), ("mask_transformer", PolicyNet(width=2))]
)
@torch.no_grad()
def test_the_host_reads_no_value(decoder: str, policy: nn.Module) -> None:
    """Fake tensors have none to read. Exact mode reads its counts, so the test can fail."""
    segmenter, images = two_kinds_of_exits(policy, decoder), photographs(2, 61, 90)
    trace = segmenter.trace(images)
    counts = trace.token_counts()
    mode = FakeTensorMode()
    segmenter, inputs = faked(segmenter, mode), mode.from_tensor(images)
    replay = faked_trace(trace.untrim(), mode)
    with mode:
        for named in ({}, {"expected_tokens": counts}, {"replay": replay}):
            found = run(segmenter, inputs, static=True, **named)
            assert found.scores.shape == (2, CLASSES, 8, 12) and found.labels.shape == (2, 61, 90)
        with pytest.raises(DataDependentOutputException):
            segmenter.predict(inputs)


# Refusals


def test_bad_expectations_are_refused_by_name() -> None:
    images = photographs(1, 64, 64)
    encoder = segmenter_of(images).encoder
    cases: list[tuple[Any, type[Exception], str]] = [
        ((1, 2), ValueError, r"expected_tokens: expected 3 counts, one after the merge and after each exit, got 2"),
        ((1, 2, 3, 4), ValueError, r"expected_tokens: expected 3 counts, .* got 4"),
        ((), ValueError, r"expected_tokens: expected 3 counts, .* got 0"),
        (7, TypeError, r"expected_tokens: expected a sequence of ints, got int 7"),
        (torch.ones(3), TypeError, r"expected_tokens: expected a sequence of ints, got float32"),
        ((1, 2.5, 3), TypeError, r"expected_tokens\[1\]: "),
        ((1, 2, -3), ValueError, r"expected_tokens\[2\]: "),
    ]
    with torch.no_grad():
        for value, error, message in cases:
            with pytest.raises(error, match=message):
                encoder(images, static=True, expected_tokens=value)
        with pytest.raises(ValueError, match="expected_tokens: expected None in exact mode"):
            encoder(images, expected_tokens=(1, 2, 3))
        with pytest.raises((TypeError, ValueError), match="static: "):
            encoder(images, static="yes")


def test_gradients_are_refused() -> None:
    images = photographs(1, 64, 64)
    segmenter = segmenter_of(images)
    for function in (segmenter, segmenter.encoder):
        with pytest.raises(RuntimeError, match="static mode is for inference: expected gradients to be disabled"):
            function(images, static=True)
    segmenter.predict(images, static=True)


@torch.no_grad()
def test_replays_of_other_images_or_encoders_are_refused_by_name() -> None:
    images = photographs(2, 64, 64)
    segmenter = segmenter_of(images)
    trace = segmenter.trace(images)
    first, second = trace.stages

    def refuse(replay: Any, message: str, inputs: Tensor = images, error: type[Exception] = ValueError) -> None:
        for function in (segmenter, segmenter.encoder, segmenter.predict):
            with pytest.raises(error, match=message):
                function(inputs, replay=replay, static=True)

    for good in (trace, trace.untrim()):
        refuse(good, r"replay.layout: expected batch size 1 as the images have, got 2", images[:1])
        refuse(good, r"replay.layout: expected grid \(8, 9\) as the images have", photographs(2, 64, 72))
        refuse(Trace(good.layout), r"replay: expected one stage for each exit, after blocks \[1, 3\], got .* \[\]")
        refuse(Trace(good.layout, (*reversed(good.stages),)), r"got stages after blocks \[3, 1\]")
        short = dataclasses.replace(good.stages[1], halted=good.stages[1].halted[1:])
        refuse(Trace(good.layout, (good.stages[0], short)), r"replay.stages\[1\].halted: expected shape")
        numbers = dataclasses.replace(good.stages[0], halted=good.stages[0].halted.int())
        refuse(
            Trace(good.layout, (numbers, good.stages[1])), r"stages\[0\].halted: expected dtype bool", error=TypeError
        )
    refuse("yesterday's", "replay: expected a Trace or None, got", error=TypeError)
    other = SupertokenLayout.uniform(2, (8, 8))
    refuse(Trace(other, trace.stages), "replay.layout: expected prefix tokens 1 as the images have, got 0")
    refuse(Trace(trace.layout, (first, dataclasses.replace(second, layout=other))), r"stages\[1\].layout: .* prefix")
    with pytest.raises(ValueError, match=r"replay.layout: expected a trimmed layout, .* call trim\(\)"):
        segmenter(images, replay=trace.untrim())
