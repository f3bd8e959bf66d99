"""Pictures as the code of their checkpoint evaluates them: in windows, enlarged or resized, mirrored, at several scales."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_grid, check_int, check_number
from ..numerics import Axis, axis_of, stretch
from .images import check_images
from .segmenter import StepSegmenter
from .trace import Trace

__all__ = ["Runs", "crops_of", "predict_windows", "run_size"]

SCORES_AT_A_TIME = 1 << 24  # class scores at image size that exist at once: 64 MiB in fp32

Size = int | tuple[int, int] | None
Window = Size | Literal["whole"]
Resize = Size | Literal["own"]
Runs = list[tuple[torch.Size, Trace]]
View = tuple[Tensor, Axis, Axis]  # scores [(B,) C, rows, columns of all crops], to pixels downwards and across


@torch.no_grad()
def predict_windows(
    segmenter: StepSegmenter,
    images: Tensor,
    window: Window = None,
    stride: Size = None,
    *,
    max_crops: int | None = None,
    resize: Resize = None,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    runs: Runs | None = None,
) -> Tensor:
    """Labels at image size from overlapping crops, which run together as one ragged batch.

    Equivalent PyTorch for one image, with ``starts = window_starts(size, window, stride)`` of each axis::

        scores, counts = torch.zeros(num_classes, H, W), torch.zeros(H, W)
        for y, x in itertools.product(row_starts, column_starts):
            crop = segmenter(image[None, :, y : y + window, x : x + window])
            crop = F.interpolate(crop, (window, window), mode="bilinear", align_corners=False)[0]
            scores[:, y : y + window, x : x + window] += crop
            counts[y : y + window, x : x + window] += 1
        labels = (scores / counts).argmax(0)

    Crops begin every ``stride`` pixels; the last one of a row or column is moved inside the image. Where the image is smaller than the window, the
    crop is the whole side, or, if ``segmenter.info.enlarge``, the image is first enlarged to the window, its shape kept. A crop that is no multiple of
    the patch size is padded and upsampled as by `StepSegmenter.predict`, which an image of one crop equals. Scores of an image that was resized are
    brought to its own size bilinearly; there the softmax of several views is averaged. Memory: the crops' scores on the patch grid, and class scores
    at image size of a band of rows only.

    Sources: Segmenter (arXiv 2105.05633) and its ``inference``; mmsegmentation's test mode "slide"; mmcv's ``rescale_size``.

    Args:
        segmenter: the model; merging and exits decide in every crop by itself.
        images: [B, C, H, W], normalised, in the parameters' dtype.
        window: crop size in pixels, or (height, width), or ``"whole"``. None: ``segmenter.info``'s, with its stride, or else whole images.
        stride: pixels from one crop to the next, or (down, right). None: the window; then only the last crops overlap.
        max_crops: so many crops run at a time. None: all of all images.
        resize: pixels of the shorter side that images are run at, or (shorter, longer), beyond neither of which they are then; ``"own"``: their own
            size. None: as ``segmenter.info`` tells, or else that.
        scales: factors of that size, each a view.
        mirror: each view also mirrored left to right.
        runs: a list that gets the shape of each batch that was run, and its decisions.

    Returns:
        Class numbers [B, H, W], contiguous: uint8 up to 256 classes, else int32.

    Raises:
        TypeError, ValueError: images as `StepSegmenter.forward`; a size or factor that is not positive, or a ``stride`` larger than the window, which
            would leave pixels without a label.
    """
    if not isinstance(segmenter, StepSegmenter):
        raise TypeError(f"segmenter: expected a StepSegmenter, got {type(segmenter).__name__}")
    check_images(images, segmenter.encoder.vit.embedding.weight)
    most = None if max_crops is None else check_int("max_crops", max_crops, minimum=1)
    if not scales:
        raise ValueError("scales: expected at least one factor, got none")
    shape, views = images.shape[2:], list[View]()
    for factor, mirrored in itertools.product(scales, (False, True) if mirror else (False,)):
        pictures = images.flip(3) if mirrored else images
        size, starts, crops = crops_of(segmenter, pictures, window, stride, resize, factor)
        alone = len(crops) == len(images) and len(scales) == 1 and not mirror and size == shape
        run = segmenter.decide_and_predict if alone else segmenter.run
        found = [(batch.shape, *run(batch)) for batch in crops.split(most or len(crops))]
        if runs is not None:
            runs += ((batch, trace) for batch, _, trace in found)
        scores = torch.cat([scores for _, scores, _ in found])
        if alone:
            return scores
        grid, crop, patch_size = scores.shape[2:], crops.shape[2:], segmenter.encoder.vit.patch_size
        whole = [max(own, cells * patch_size) for own, cells in zip(crop, grid, strict=True)]
        parts = zip(grid, crop if segmenter.info.stretch else whole, crop, starts, size, shape, strict=True)
        down, across = (axis_of(*part, like=scores) for part in parts)
        across = (across[0].flip(1), across[1].flip(1)) if mirrored else across
        scores = scores.unflatten(0, (len(images), *map(len, starts))).permute(0, 3, 1, 4, 2, 5)
        views.append((scores.flatten(4, 5).flatten(2, 3), down, across))
    labels = images.new_empty(len(images), *shape, dtype=torch.uint8 if segmenter.num_classes <= 256 else torch.int32)
    for number, out in enumerate(labels):
        label_image([(scores[number], down, across) for scores, down, across in views], out)
    return labels


def crops_of(
    segmenter: StepSegmenter, images: Tensor, window: Window, stride: Size, resize: Resize = None, scale: float = 1.0
) -> tuple[tuple[int, int], list[list[int]], Tensor]:
    """What `predict_windows` runs of one view: images' size in it, where crops begin in rows and columns, the crops [B * crops, C, h, w].

    Of labels, which are integers, the nearest are taken where images are resized.
    """
    height, width = run_size(segmenter, images.shape[2:], resize, scale)
    if window is None:
        window, stride = segmenter.info.window or "whole", stride or segmenter.info.stride
    window = (height, width) if window == "whole" else as_pair("window", window)
    stride = window if stride is None else as_pair("stride", stride)
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise ValueError(f"stride: expected at most the window {window}, or pixels would get no label, got {stride}")
    sizes = [(height, width)]
    if segmenter.info.enlarge and (height < window[0] or width < window[1]):
        wide, tall = (window[0], int(width / height * window[0])), (int(height / width * window[1]), window[1])
        sizes.append(wide if height * window[1] < width * window[0] else tall)
    for size in sizes:
        if images.shape[2:] != size and images.is_floating_point():
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        elif images.shape[2:] != size:
            images = F.interpolate(images.float(), size, mode="nearest-exact").to(images.dtype)
    starts = [window_starts(*each) for each in zip(sizes[-1], window, stride, strict=True)]
    crops = [images[:, :, y : y + window[0], x : x + window[1]] for y, x in itertools.product(*starts)]
    return sizes[-1], starts, crops[0] if len(crops) == 1 else torch.stack(crops, 1).flatten(0, 1)


def run_size(segmenter: StepSegmenter, shape: Sequence[int], resize: Resize, scale: float = 1.0) -> tuple[int, int]:
    """Height and width at which an image of that size is run, before a window enlarges it."""
    (height, width), scale = shape, check_number("scales", scale, minimum=0)
    resize = segmenter.info.resize if resize is None else None if resize == "own" else resize
    if resize is not None:
        short, long = resize if isinstance(resize, (tuple, list)) else (resize, 1 << 40)
        limits = [int(check_int("resize", side, minimum=1) * scale) for side in (short, long)]
        scale = min(limits[0] / min(height, width), limits[1] / max(height, width))
    return check_grid("scales, to sizes", (int(height * scale + 0.5), int(width * scale + 0.5)))


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the crops along one axis: every ``stride``, and one that ends with the axis."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def as_pair(name: str, value: object) -> tuple[int, int]:
    """(height, width) of an int or a pair."""
    return check_grid(name, value if isinstance(value, (tuple, list)) else (value, value))


def label_image(views: list[View], labels: Tensor) -> None:
    """Write the labels [H, W] of one image from its views."""
    height, width = labels.shape
    row = max(scores.shape[0] * max(width, scores.shape[2]) for scores, _, _ in views)
    for top in range(0, height, most := max(1, SCORES_AT_A_TIME // row)):
        tall = [(stretch(scores, down, 1, slice(top, top + most)), across) for scores, down, across in views]
        found = [stretch(scores, across, 2, slice(width)) for scores, across in tall]
        best = found[0] if len(found) == 1 else torch.stack([scores.softmax(0) for scores in found]).sum(0)
        labels[top : top + most] = best.max(0).indices
