"""`StepSegmenter.capture` without a GPU, on an eager stand-in for the CUDA graph.

What a graph itself does is shown by tests/gpu/test_capture.py.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager_graph import SIZE, EagerGraph, case, eager_graphs
from small_models import DECODERS, HEADS, photographs
from torch import Tensor

from step_kernels.model import StepSegmenter, Trace
from step_kernels.model.graph import capture

pytestmark = pytest.mark.usefixtures(eager_graphs.__name__)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", [None, *HEADS])
def test_new_images_give_what_predict_gives(head: str | None, decoder: str) -> None:
    segmenter, images = case(head, decoder)
    captured = segmenter.capture(images)
    assert captured.batch_size == 3 and captured.image_shape == (3, *SIZE)
    for seed in (0, 1, 2):
        others = photographs(3, *SIZE, seed=seed).roll(seed, 0)
        assert torch.equal(captured.predict(others), segmenter.predict(others))
        assert captured.trace().token_counts() == segmenter.trace(others).token_counts()
    assert EagerGraph.made[0].calls == ["warm up", "warm up", "warm up without syncs", "record", *["replay"] * 4]
    assert captured.compile_seconds == 0.5
    assert captured.memory_bytes == 1000 + images.nbytes


def test_the_recording_knows_the_counts_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, images = case()
    seen = []
    original = StepSegmenter.decide_and_predict

    def spy(self: StepSegmenter, *args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs.get("static"), kwargs.get("expected_tokens")))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StepSegmenter, "decide_and_predict", spy)
    segmenter.capture(images)
    counts = segmenter.trace(images).token_counts()
    assert seen == [(True, None), *[(True, counts)] * 4]


def test_a_smaller_batch_and_results_that_stay() -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    first = captured.predict(images)
    kept = first.clone()
    for count in (1, 2):
        labels = captured.predict(images[:count] * 0.5)
        assert labels.shape == (count, *SIZE) and torch.equal(labels, segmenter.predict(images[:count] * 0.5))
    assert torch.equal(first, kept)
    assert first.untyped_storage().nbytes() == first.numel()


def test_inputs_of_any_strides_and_of_inference_mode() -> None:
    segmenter, images = case()
    with torch.inference_mode():
        captured = segmenter.capture(images.clone())
        inside = captured.predict(images.clone())
    expected = segmenter.predict(images)
    assert torch.equal(inside, expected)
    assert torch.equal(captured.predict(images.contiguous(memory_format=torch.channels_last)), expected)
    images.fill_(0)  # the capture has a copy
    assert torch.equal(captured.predict(photographs(3, *SIZE)), expected)


def test_replayed_decisions() -> None:
    segmenter, images = case()
    traces = [segmenter.trace(photographs(3, *SIZE, seed=seed).roll(seed, 0)) for seed in range(3)]
    captured = segmenter.capture(images, replay=traces[0])
    for trace in (traces[1], traces[2].untrim(), traces[0]):
        assert torch.equal(captured.predict(images, replay=trace), segmenter.predict(images, replay=trace.trim()))
    assert captured.trace().token_counts() == traces[0].token_counts()
    held = segmenter.trace(images).layout.cells.clone()
    assert torch.equal(traces[0].layout.cells, held)  # replays are copied in, not written to
    with pytest.raises(ValueError, match="replay: expected a Trace, as when captured, got None"):
        captured.predict(images)
    with pytest.raises(ValueError, match="images: expected 3 images with a replay, got 2"):
        captured.predict(images[:2], replay=traces[0])
    with pytest.raises(TypeError, match="replay: expected a Trace, got int"):
        captured.predict(images, replay=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch size 3 as the images have, got 2"):
        captured.predict(images, replay=segmenter.trace(images[:2]))
    with pytest.raises(ValueError, match="one stage for each exit"):
        captured.predict(images, replay=Trace(traces[0].layout))
    with pytest.raises(TypeError, match="replay: expected a Trace or None, got int"):
        segmenter.capture(images, replay=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="replay: expected None, as when captured"):
        segmenter.capture(images).predict(images, replay=traces[0])


def test_other_images_are_refused() -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    refused = [
        (ValueError, r"images: expected shape \[b, 3, 61, 72\], got \[3, 3, 64, 72\]", photographs(3, 64, 72)),
        (ValueError, "images: expected 1 to 3 images, as many as were captured, got 4", photographs(4, *SIZE)),
        (ValueError, "images: expected 1 to 3 images", images[:0]),
        (TypeError, "images: expected torch.float32 as the captured images has, got torch.float64", images.double()),
        (ValueError, "images: expected a tensor on cpu as the captured images is, got one on meta", images.to("meta")),
        (TypeError, "images: expected a tensor", "a picture"),
    ]
    for error, message, others in refused:
        with pytest.raises(error, match=message):
            captured.predict(others)  # type: ignore[arg-type]
    assert EagerGraph.made[0].calls.count("replay") == 1  # the capture's own


def test_several_captures_live_side_by_side() -> None:
    segmenter, images = case()
    other_size = photographs(2, 64, 40)
    first, second, third = segmenter.capture(images), segmenter.capture(other_size), segmenter.capture(images[:1])
    for _ in range(2):
        assert torch.equal(second.predict(other_size), segmenter.predict(other_size))
        assert torch.equal(first.predict(images), segmenter.predict(images))
        assert torch.equal(third.predict(images[1:2]), segmenter.predict(images[1:2]))


def test_a_trace_is_for_training_too() -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    with torch.inference_mode():
        captured.predict(images)
        trace = captured.trace()
    segmenter(images, replay=trace).sum().backward()


def test_deleting_waits_for_the_device() -> None:
    segmenter, images = case(None)
    captured = segmenter.capture(images)
    graph = EagerGraph.made[0]
    assert "wait" not in graph.calls
    del captured
    gc.collect()
    assert graph.calls[-1] == "wait"


def test_threads_take_turns() -> None:
    segmenter, images = case(None)
    captured = segmenter.capture(images)
    inputs = [photographs(3, *SIZE, seed=seed) for seed in range(4)]
    expected = [segmenter.predict(own) for own in inputs]
    wrong: list[object] = []

    def work(own: Tensor, labels: Tensor) -> None:
        try:
            wrong.extend(1 for _ in range(3) if not torch.equal(captured.predict(own), labels))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_capture_is_refused_where_there_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    segmenter, images = case()
    with pytest.raises(RuntimeError, match="capture: expected images on a CUDA device, got cpu"):
        segmenter.capture(images)
    with pytest.raises(TypeError, match="images: expected a tensor"):
        segmenter.capture(None)  # type: ignore[arg-type]
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
    monkeypatch.setattr(capture, "selected_backend", lambda *_: "reference")
    monkeypatch.setattr(capture, "why_not_triton", lambda *_: "of float64")
    with pytest.raises(RuntimeError, match=r"capture: expected Triton kernels.*but of float64"):
        capture.refuse_unless_capturable(on_gpu)
    monkeypatch.setattr(capture, "selected_backend", lambda *_: "triton")
    monkeypatch.setattr(capture.checks, "values", lambda: True)
    with pytest.raises(RuntimeError, match="STEP_KERNELS_CHECK"):
        capture.refuse_unless_capturable(on_gpu)


def test_a_forward_that_waits_for_the_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def warm_up(self: EagerGraph, run: Callable[[], Any], *, syncs: bool) -> Any:
        if not syncs:
            raise RuntimeError("called a synchronizing CUDA operation")
        return run()

    monkeypatch.setattr(EagerGraph, "warm_up", warm_up)
    segmenter, images = case()
    with pytest.raises(RuntimeError, match=r"capture: the prediction cannot be recorded.*synchronizing"):
        segmenter.capture(images)
    monkeypatch.setattr(EagerGraph, "record", out_of_memory)
    monkeypatch.setattr(EagerGraph, "warm_up", lambda self, run, *, syncs: run())
    with pytest.raises(torch.OutOfMemoryError, match="all of it"):
        segmenter.capture(images)


def out_of_memory(self: EagerGraph, run: Callable[[], Any]) -> Any:
    raise torch.OutOfMemoryError("all of it")
