"""A trace as data: its tensors, copies of it, the decisions on one of its images, files, counts and a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import photographs, small_segmenter
from static_runs import assert_same_trace, decided, every_other
from tensors import close
from torch import Tensor

from step_kernels.model import StepSegmenter, Trace, count_flops
from step_kernels.model.flops import counted_run


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


def test_stages_hold_the_exits_confidence_and_class() -> None:
    segmenter, images, trace = case()
    with torch.no_grad():
        now, encoder = segmenter.encoder.start(images), segmenter.encoder
        for number in range(1, 5):
            now.tokens = encoder.vit.packed_block(number, now.tokens, now.inputs)
            if (head := encoder.exit_heads().get(number)) is not None:
                stage = next(each for each in trace.stages if each.block == number)
                normed = F.layer_norm(now.tokens, (48,), head.norm.weight, head.norm.bias, head.norm.eps)
                confidence, labels = F.linear(normed, head.head.weight, head.head.bias).softmax(1).max(1)
                patch = now.inputs.layout.cells[:, 3] > 0
                close(stage.confidence, torch.where(patch, confidence.float(), 0))
                assert torch.equal(stage.labels, torch.where(patch, labels, -1).int())
                assert torch.equal(stage.halted, stage.confidence > head.threshold) and stage.halted.any()
                encoder.take_exit(now, number, head)


def test_static_mode_leaves_the_same_trace(tmp_path: Path) -> None:
    segmenter, images, trace = case()
    with torch.no_grad():
        static = segmenter.decide_and_predict(images, static=True)[1]
    assert not static.layout.trimmed and len(static.stages[1].confidence) == 3 * static.layout.max_seqlen
    for same in (static.trim(), trace.untrim().trim(), trace.to("cpu")):
        assert_same_trace(same, trace)
    assert torch.equal(static.exit_blocks(), trace.exit_blocks()) and static.summary() == trace.summary()
    assert trace.to("meta").stages[0].labels.is_meta and trace.to("meta").layout.cells.is_meta
    static.save(tmp_path / "a.npz")
    assert_same_trace(Trace.load(tmp_path / "a.npz"), trace)


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    segmenter, images, trace = case()
    trace.save(tmp_path / "trace.npz")
    read = Trace.load(tmp_path / "trace.npz")
    assert_same_trace(read, trace)
    assert torch.equal(segmenter.predict(images, read), segmenter.predict(images))
    rows = {name: value.dtype for name, value in np.load(tmp_path / "trace.npz").items()}
    assert rows["halted_0"].kind == "b" and rows["confidence_1"] == np.float32 and rows["labels_1"] == np.int32
    by_hand = decided(trace.layout, {2: every_other})
    by_hand.save(tmp_path / "by_hand.npz")
    again = Trace.load(tmp_path / "by_hand.npz")
    assert_same_trace(again, by_hand)
    assert again.stages[0].confidence is None
    np.savez(tmp_path / "other.npz", cells=np.zeros(3))
    with pytest.raises(ValueError, match="got one without blocks, cu_seqlens, grid, num_prefix"):
        Trace.load(tmp_path / "other.npz")
    np.savez(
        tmp_path / "cut.npz",
        **{name: value for name, value in np.load(tmp_path / "trace.npz").items() if name != "halted_1"},
    )
    with pytest.raises(ValueError, match="got one without halted_1"):
        Trace.load(tmp_path / "cut.npz")


def test_exits_of_cells_and_counts_are_those_of_the_tokens_one_by_one() -> None:
    segmenter, images, trace = case()
    (rows, cols), expected = trace.layout.grid, torch.zeros(3, *trace.layout.grid, dtype=torch.int32)
    tokens, sides, lines = trace.layout.cells.tolist(), Counter(), []
    for _, _, _, side in tokens:
        sides[side] += side > 0
    lines.append({"block": 0, "halted": 0, "tokens": sum(sides.values())})
    for stage in trace.stages:
        gone = [token for token, out in zip(tokens, stage.halted.tolist(), strict=True) if out]
        tokens = [token for token in tokens if token not in gone]
        for image, row, col, side in gone:
            expected[image, row : row + side, col : col + side] = stage.block
        lines.append({"block": stage.block, "halted": len(gone), "tokens": sum(side > 0 for *_, side in tokens)})
    assert torch.equal(trace.exit_blocks(), expected) and len(expected.unique()) == 3
    told = {"images": 3, "patches": 3 * rows * cols, "sides": dict(sorted((+sides).items())), "stages": lines}
    assert trace.summary() == told
    flops = count_flops(segmenter, images.shape, trace)
    own, scores, again = counted_run(segmenter, images)
    assert own == flops and torch.equal(segmenter.labels(scores, images.shape[2:]), segmenter.predict(images))
    assert_same_trace(again, trace)
    gflops = [stage["gflops"] for stage in trace.summary(flops)["stages"]]
    assert sum(gflops) == pytest.approx(flops.total / 1e9) and flops.decoder / 1e9 < gflops[-1] < gflops[1] < gflops[0]


@pytest.mark.parametrize("kind", [torch.uint8, torch.float64])
def test_a_figure_shows_each_image(kind: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, images, trace = case()
    images = (images - images.min()).mul(9).clamp(max=255).to(kind)
    figure = trace.figure(images, ["a_b", "c", "d"])
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    for number, (title, name) in enumerate(zip(titles, ("a b", "c", "d"), strict=True)):
        own = trace.image(number)
        tokens, halted = own.layout.num_tokens - own.layout.num_prefix, sum(int(x.halted.sum()) for x in own.stages)
        assert title.startswith(f"{name}: {tokens} of {own.layout.grid[0] * own.layout.grid[1]} tokens")
        assert title.endswith(f"{halted} halt early")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:1] == ["1x1"] and labels[-2:] == ["halts after block 1", "halts after block 3"]
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 5000
