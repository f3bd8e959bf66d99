"""predict_windows against a plain loop over crops; what it costs; its refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import photographs, small_segmenter
from torch import Tensor

from step_kernels.model import StepSegmenter, VariancePolicy, windows
from step_kernels.model.windows import predict_windows
from step_kernels.numerics import axis_of

PATCH = 8


def mmseg_boxes(size: int, window: int, stride: int) -> list[tuple[int, int]]:
    """mmsegmentation's rule: (start, end) along one axis."""
    boxes = []
    for number in range(max(size - window + stride - 1, 0) // stride + 1):
        end = min(number * stride + window, size)
        boxes.append((max(end - window, 0), end))
    return boxes


def plain_loop(
    segmenter: StepSegmenter, image: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Average class scores and counts of one image, crop by crop at full resolution."""
    height, width = image.shape[1:]
    scores = image.new_zeros(segmenter.num_classes, height, width)
    counts = image.new_zeros(height, width)
    rows, cols = (mmseg_boxes(*sizes) for sizes in zip((height, width), window, stride, strict=True))
    for (top, bottom), (left, right) in itertools.product(rows, cols):
        with torch.no_grad():
            crop = segmenter(image[None, :, top:bottom, left:right])
        full = F.interpolate(crop, (crop.shape[2] * PATCH, crop.shape[3] * PATCH), mode="bilinear")[0]
        scores[:, top:bottom, left:right] += full[:, : bottom - top, : right - left]
        counts[top:bottom, left:right] += 1
    return scores / counts, counts


# Image, window, stride: aligned to the patch of 8 or not, overlapping up to 9 times or not at all, one crop high, smaller
# than the window on one side.
CASES = {
    "aligned": ((64, 96), (32, 32), (16, 16)),
    "odd image": ((61, 90), (32, 32), (24, 24)),
    "odd window": ((61, 75), (27, 30), (13, 9)),
    "no overlap": ((64, 64), (32, 32), (32, 32)),
    "one row": ((32, 100), (32, 48), (32, 20)),
    "smaller": ((20, 100), (32, 48), (16, 20)),
}


@pytest.mark.parametrize("exits", [None, "linear"])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_crops(case: str, exits: str | None) -> None:
    size, window, stride = CASES[case]
    segmenter = small_segmenter(exits, dtype=torch.float64)
    images = photographs(2, *size, dtype=torch.float64)
    labels = predict_windows(segmenter, images, window, stride)
    assert labels.dtype == torch.uint8 and labels.shape == (2, *size) and labels.is_contiguous()
    for image, own in zip(images, labels, strict=True):
        scores, counts = plain_loop(segmenter, image, window, stride)
        assert counts.min() >= 1
        best = scores.topk(2, dim=0).values
        assert (best[0] - best[1]).min() > 1e-9, "the case has a tie, which would prove nothing"
        assert torch.equal(own, scores.argmax(0).to(torch.uint8))


def test_the_overlap_matters() -> None:
    """The cases above could not tell a wrong average from a right one if one crop alone gave the same labels."""
    segmenter, images = small_segmenter(dtype=torch.float64), photographs(1, 64, 96, dtype=torch.float64)
    overlapping = predict_windows(segmenter, images, 32, 16)
    for other in (predict_windows(segmenter, images, 32), segmenter.predict(images)):
        assert 0.05 < (overlapping != other).double().mean() < 0.95


@pytest.mark.parametrize("max_crops", [1, 4, 100])
def test_fewer_crops_at_a_time_change_nothing(max_crops: int) -> None:
    segmenter, images = small_segmenter(dtype=torch.float64), photographs(2, 61, 90, dtype=torch.float64)
    whole = predict_windows(segmenter, images, (32, 40), 24)
    assert torch.equal(whole, predict_windows(segmenter, images, (32, 40), 24, max_crops=max_crops))


def test_crops_run_as_ragged_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, images = small_segmenter(None), photographs(2, 64, 96)
    lengths, run = [], segmenter.encoder.forward

    def listen(crops: Tensor, **options: object) -> object:
        output = run(crops, **options)
        lengths.append(output.layout.lengths().tolist())
        return output

    monkeypatch.setattr(segmenter.encoder, "forward", listen)
    predict_windows(segmenter, images, 32, 16)  # 3 x 5 crops of each image
    assert [len(batch) for batch in lengths] == [30] and len(set(lengths[0])) > 1
    lengths.clear()
    predict_windows(segmenter, images, 32, 16, max_crops=8)
    assert [len(batch) for batch in lengths] == [8, 8, 8, 6]


@pytest.mark.parametrize("window", [64, (200, 500)])
def test_one_crop_is_predict(window: int | tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(windows, "label_image")  # the fused output tail does it
    segmenter, images = small_segmenter(), photographs(3, 61, 50)
    expected = segmenter.predict(images)
    assert torch.equal(predict_windows(segmenter, images, window, 10), expected)
    assert predict_windows(segmenter, images, window, 10, max_crops=2).shape == expected.shape


def test_class_scores_at_image_size_exist_in_bands_only(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, images = small_segmenter(dtype=torch.float64), photographs(1, 61, 90, dtype=torch.float64)
    expected = predict_windows(segmenter, images, 32, 24)
    limit = segmenter.num_classes * 90 * 5  # five rows
    monkeypatch.setattr(windows, "SCORES_AT_A_TIME", limit)
    largest, stretch = [], windows.stretch

    def listen(*arguments: object) -> Tensor:
        largest.append(stretch(*arguments))
        return largest[-1]

    monkeypatch.setattr(windows, "stretch", listen)
    assert torch.equal(predict_windows(segmenter, images, 32, 24), expected)
    assert max(scores.shape[1] for scores in largest) == 5
    assert max(scores.numel() for scores in largest) <= limit


def labels_of(scores: Tensor, pixels: int, crops: int = 1) -> Tensor:
    """Of one image of ``pixels`` squared, all whose crops [crops, C, cells, cells] lie upon each other."""
    axis = axis_of(scores.shape[2], pixels, pixels, [0] * crops, pixels, pixels, like=scores)
    labels = torch.full((pixels, pixels), 9, dtype=torch.uint8)
    diagonal = torch.cat(
        [F.pad(each, (i * each.shape[1], (crops - 1 - i) * each.shape[1])) for i, each in enumerate(scores)], 1
    )
    windows.label_image([(crops * diagonal, axis, axis)], labels)  # weights are 1 / crops along both axes
    return labels


def test_infinite_scores_do_not_spread() -> None:
    """A class of log-probability -inf in one cell wins nothing there, and takes no pixel from its neighbours' crops."""
    scores = torch.zeros(1, 2, 2, 2)
    scores[0, 0] = -1.0
    scores[0, 1, 0, 0] = -torch.inf
    labels = labels_of(scores, 6)  # odd patches: some pixels lie exactly on a cell's centre
    assert labels[4:].eq(1).all() and labels[:, 4:].eq(1).all() and labels[:2, :2].eq(0).all()


def test_labels_are_those_of_argmax() -> None:
    """Of equal scores the first class, and a NaN before all, as `upsample_argmax` and argmax have it."""
    scores = torch.randint(0, 3, (1, 7, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    scores[0, 4, 0], scores[0, 2:4, 1], scores[0, :, 2] = torch.nan, torch.nan, -torch.inf
    labels = labels_of(scores, 16)
    assert torch.equal(labels[0], torch.full((16,), 4, dtype=torch.uint8))
    assert torch.equal(labels.long(), (scores[0]).argmax(0))


def test_half_precision_is_summed_in_fp32() -> None:
    """Two crops of one place: class 1 is ahead by less than a bfloat16 can add to 256."""
    scores = torch.tensor([[256.0, 256.0], [0.0, 0.5]], dtype=torch.bfloat16).view(2, 2, 1, 1)
    assert labels_of(scores, 4, crops=2).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    segmenter = small_segmenter(None, policy=VariancePolicy(0.0), dtype=dtype)
    images = photographs(1, 48, 64, dtype=dtype)
    labels = predict_windows(segmenter, images, 32, 16)
    corners = [(y, x) for y in (0, 16) for x in (0, 16, 32)]
    with torch.no_grad():
        scores = segmenter(torch.cat([images[:, :, y : y + 32, x : x + 32] for y, x in corners])).float()
    sums = torch.zeros(segmenter.num_classes, 48, 64)
    for crop, (y, x) in zip(F.interpolate(scores, (32, 32), mode="bilinear"), corners, strict=True):
        sums[:, y : y + 32, x : x + 32] += crop
    assert torch.equal(labels[0], sums.argmax(0).to(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": 0}, ValueError, r"^window\[0\]: expected an int at least 1, got 0"),
        ({"window": (32, -1)}, ValueError, r"^window\[1\]"),
        ({"window": 32.0}, TypeError, r"^window\[0\]: expected an int, got float"),
        ({"window": (1, 2, 3)}, TypeError, r"^window: expected a pair"),
        ({"stride": 0}, ValueError, r"^stride\[0\]"),
        ({"stride": 33}, ValueError, r"^stride: expected at most the window \(32, 32\).*got \(33, 33\)"),
        ({"stride": (8, 40)}, ValueError, r"^stride: expected at most the window"),
        ({"max_crops": 0}, ValueError, r"^max_crops: expected an int at least 1"),
        ({"images": torch.zeros(3, 64, 64)}, ValueError, r"^images: expected shape"),
        ({"images": torch.zeros(1, 3, 64, 64, dtype=torch.float64)}, TypeError, r"^images: expected torch.float32"),
        ({"images": torch.zeros(0, 3, 64, 64)}, ValueError, r"^images: expected at least one image"),
        ({"segmenter": torch.nn.Identity()}, TypeError, r"^segmenter: expected a StepSegmenter, got Identity"),
    ],
)
def test_refusals(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"segmenter": small_segmenter(), "images": torch.zeros(1, 3, 64, 64), "window": 32, "stride": 16}
    with pytest.raises(error, match=message):
        predict_windows(**(arguments | changes))
