"""predict_windows against what the checkpoints' own code does with pictures of other sizes, written again in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import small_segmenter
from torch import Tensor

from step_kernels.model import CheckpointInfo, StepSegmenter
from step_kernels.model.windows import predict_windows

PATCH = 8
SEGMENTER = CheckpointInfo("Segmenter", window=(40, 40), stride=(24, 24), enlarge=True)
MMSEG = CheckpointInfo("mmsegmentation Segmenter", window=(40, 48), stride=(24, 30), stretch=True)
RATIOS = (0.5, 1.0, 1.75)


def model(info: CheckpointInfo) -> StepSegmenter:
    segmenter = small_segmenter(None, dtype=torch.float64)
    with torch.no_grad():  # on average no class is ahead
        segmenter.decoder.head.bias -= segmenter(pictures(1, 96, 96)).mean((0, 2, 3))
    segmenter.info = info
    return segmenter


def pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def rescaled(image: Tensor, scale: tuple[int, int]) -> Tensor:
    """mmcv's imrescale(img, scale) with keep_ratio: within ``scale``'s longer and shorter side."""
    height, width = image.shape[2:]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return F.interpolate(image, (int(height * factor + 0.5), int(width * factor + 0.5)), mode="bilinear")


def segmenters_own(
    segmenter: StepSegmenter, views: list[tuple[Tensor, bool]], size: tuple[int, int], window: int, stride: int
) -> Tensor:
    """segm/model/utils.py's ``inference``: views are (image, was it mirrored); probabilities [C, H, W]."""
    total = torch.zeros(segmenter.num_classes, *size, dtype=torch.float64)
    for view, flip in views:
        height, width = view.shape[2:]
        if min(height, width) < window:
            wide = window, int(width / height * window)
            new = wide if height < width else (int(height / width * window), window)
            view = F.interpolate(view, new, mode="bilinear")
        height, width = view.shape[2:]
        logit, count = (
            torch.zeros(segmenter.num_classes, height, width, dtype=torch.float64),
            torch.zeros(height, width),
        )
        for top in [h for h in range(0, height, stride) if h < height - window] + [height - window]:
            for left in [w for w in range(0, width, stride) if w < width - window] + [width - window]:
                place = slice(top, top + window), slice(left, left + window)
                crop = F.pad(view[:, :, *place], (0, -window % PATCH, 0, -window % PATCH))
                masks = F.interpolate(segmenter(crop), crop.shape[2:], mode="bilinear")
                logit[:, *place] += masks[0, :, :window, :window]
                count[place] += 1
        logit = F.interpolate((logit / count)[None], size, mode="bilinear")[0]
        total += torch.softmax(logit.flip(2) if flip else logit, 0)
    return total / len(views)


def mmsegs_own(segmenter: StepSegmenter, image: Tensor, size: tuple[int, int], test_cfg: dict[str, object]) -> Tensor:
    """EncoderDecoder.slide_inference or whole_inference, and postprocess_result: logits [C, H, W]."""

    def encode_decode(inputs: Tensor) -> Tensor:
        return F.interpolate(segmenter(inputs), inputs.shape[2:], mode="bilinear", align_corners=False)

    if test_cfg["mode"] == "whole":
        logits = encode_decode(image)
    else:
        (h_stride, w_stride), (h_crop, w_crop) = test_cfg["stride"], test_cfg["crop_size"]
        _, _, h_img, w_img = image.shape
        preds, count = torch.zeros(1, segmenter.num_classes, h_img, w_img, dtype=image.dtype), torch.zeros(h_img, w_img)
        for h_idx in range(max(h_img - h_crop + h_stride - 1, 0) // h_stride + 1):
            for w_idx in range(max(w_img - w_crop + w_stride - 1, 0) // w_stride + 1):
                y2, x2 = min(h_idx * h_stride + h_crop, h_img), min(w_idx * w_stride + w_crop, w_img)
                y1, x1 = max(y2 - h_crop, 0), max(x2 - w_crop, 0)
                preds[:, :, y1:y2, x1:x2] += encode_decode(image[:, :, y1:y2, x1:x2])
                count[y1:y2, x1:x2] += 1
        logits = preds / count
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]


def equal(found: Tensor, scores: Tensor) -> None:
    best = scores.topk(2, dim=0).values
    assert (best[0] - best[1]).min() > 1e-9, "the case has a tie, which would prove nothing"
    assert torch.equal(found, scores.argmax(0).to(torch.uint8))


SIZES = [(90, 61), (30, 100), (25, 18), (40, 40)]  # above the window, one side below it, both, equal


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [(40, 24), (37, 11)])
def test_segmenter_enlarges_what_is_smaller_than_the_window(size: tuple[int, int], window: tuple[int, int]) -> None:
    side, stride = window
    segmenter, images = (
        model(replace(SEGMENTER, window=(side,) * 2, stride=(stride,) * 2)),
        pictures(2, *size),
    )
    labels = predict_windows(segmenter, images)
    for image, own in zip(images, labels, strict=True):
        equal(own, segmenters_own(segmenter, [(image[None], False)], size, side, stride))
    if min(size) < side:
        plain = predict_windows(model(replace(segmenter.info, enlarge=False)), images)
        assert (plain != labels).double().mean() > 0.02, "the enlargement changes nothing"


@torch.no_grad()
@pytest.mark.parametrize("size", [(90, 61), (25, 18)])
def test_segmenter_resized_at_several_scales_and_mirrored(size: tuple[int, int]) -> None:
    """The original's evaluation: im_size 64 with the longer side at most 80, and its multi-scale mode."""
    segmenter, image = model(SEGMENTER), pictures(1, *size)
    views = []
    for ratio in RATIOS:
        view = rescaled(image, (int(80 * ratio), int(64 * ratio)))
        views += [(view, False), (view.flip(3), True)]
    labels = predict_windows(segmenter, image, resize=(64, 80), scales=RATIOS, mirror=True)[0]
    equal(labels, segmenters_own(segmenter, views, size, 40, 24))
    single = predict_windows(segmenter, image, resize=(64, 80))[0]
    equal(single, segmenters_own(segmenter, [(rescaled(image, (80, 64)), False)], size, 40, 24))
    assert (single != labels).any() and (single != predict_windows(segmenter, image)[0]).any()


@torch.no_grad()
@pytest.mark.parametrize("size", [(45, 83), (33, 20), (64, 64)])
@pytest.mark.parametrize("resize", [None, 50])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_mmsegmentation_stretches_the_grid_over_picture_and_crop(
    size: tuple[int, int], resize: int | None, mode: str
) -> None:
    segmenter, image = model(MMSEG), pictures(1, *size)
    test_cfg = {"mode": mode, "stride": (24, 30), "crop_size": (40, 48)}
    if mode == "whole":
        segmenter.info = replace(MMSEG, window=None, stride=None)
    scaled = image if resize is None else rescaled(image, (10**9, resize))
    labels = predict_windows(segmenter, image, resize=resize)[0]
    equal(labels, mmsegs_own(segmenter, scaled, size, test_cfg))
    if resize is None and mode == "whole":
        assert torch.equal(segmenter.predict(image)[0], labels)
        cut = model(replace(segmenter.info, stretch=False)).predict(image)[0]
        assert (cut != labels).any() == any(side % PATCH for side in size)


def test_what_was_run_is_told() -> None:
    segmenter, runs = model(SEGMENTER), []
    predict_windows(segmenter, pictures(1, 30, 30), max_crops=1, scales=(1, 2), mirror=True, runs=runs)
    assert [list(shape) for shape, _ in runs] == 10 * [
        [1, 3, 40, 40]
    ]  # 40 x 40, then 60 x 60 in four crops, each twice
    assert all(trace.layout.batch_size == 1 for _, trace in runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales: expected at least one factor"),
        ({"scales": (0.0,)}, r"scales, to sizes\[0\]: expected an int at least 1, got 0"),
        ({"scales": (-1.0,)}, "scales: expected a number of at least 0"),
        ({"resize": 0}, "resize: expected an int at least 1, got 0"),
        ({"resize": (64, 0)}, "resize: expected an int at least 1, got 0"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_windows(model(SEGMENTER), pictures(1, 30, 30), **options)  # type: ignore[arg-type]
