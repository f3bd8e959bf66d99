"""A trace as data: its tensors, copies of it, and the decisions on one of its images."""

from __future__ import annotations

import pytest
import torch
from small_models import photographs, small_segmenter
from static_runs import assert_same_trace
from torch import Tensor

from step_kernels.model import StepSegmenter, Trace


def case() -> tuple[StepSegmenter, Tensor, Trace]:
    segmenter = small_segmenter(dtype=torch.float64)
    images = photographs(3, 61, 90, dtype=torch.float64)
    return segmenter, images, segmenter.trace(images)


@pytest.mark.parametrize("trimmed", [True, False])
def test_the_decisions_on_one_image_are_those_of_a_batch_of_one(trimmed: bool) -> None:
    segmenter, images, trace = case()
    labels = segmenter.predict(images)
    for number, image in enumerate(images):
        own = (trace if trimmed else trace.untrim()).image(number)
        assert_same_trace(own, segmenter.trace(image[None]))
        assert torch.equal(segmenter.predict(image[None], own)[0], labels[number])


@pytest.mark.parametrize("number", [-1, 3])
def test_an_image_outside_of_the_batch_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"number: expected an int between 0 and 2, got {number}"):
        case()[2].image(number)


def test_a_copy_has_equal_tensors_of_its_own() -> None:
    trace = case()[2]
    copy = trace.clone()
    assert_same_trace(copy, trace)
    assert len(trace.tensors()) == 3 * 2 + 2
    counts, blocks = trace.token_counts(), [stage.block for stage in trace.stages]
    exits = ", ".join(f"{count} tokens after block {block}" for count, block in zip(counts[1:], blocks, strict=True))
    rows, cols = trace.layout.grid
    assert repr(trace) == f"Trace(3 x {rows} x {cols} patches, {counts[0]} tokens after the merge, {exits})"
    assert f"at most {3 * trace.layout.max_seqlen} tokens after the merge" in repr(trace.untrim())
    before = [tensor.clone() for tensor in trace.tensors()]
    for tensor in copy.tensors():
        tensor.zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, trace.tensors(), strict=True))
