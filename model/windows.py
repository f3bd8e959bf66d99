"""Sliding windows: labels of images larger than the model was made for, from overlapping crops."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..checks import check_grid, check_int
from ..numerics import accumulator, taps
from .images import check_images
from .segmenter import StepSegmenter

__all__ = ["predict_windows", "window_starts"]

SCORES_AT_A_TIME = 1 << 24  # class scores at image size that exist at once: 64 MiB in fp32

Axis = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def predict_windows(
    segmenter: StepSegmenter,
    images: Tensor,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    *,
    max_crops: int | None = None,
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

    Crops begin every ``stride`` pixels; the last one of a row or column is moved inside the image. Where the image is
    smaller than the window, the crop is the whole side. A crop that is no multiple of the patch size is padded as
    `StepSegmenter.forward` does. An image of one crop gives exactly what `StepSegmenter.predict` gives.

    Memory: the crops' scores on the patch grid, and class scores at image size of a band of rows only. Overlaps are
    averaged at image size, as above, not on the patch grid, where the borders of crops would blur into each other.

    Sources: Segmenter (arXiv 2105.05633) and mmsegmentation's test mode "slide".

    Args:
        segmenter: the model; merging and exits decide in every crop by itself.
        images: [B, C, H, W], normalised, in the parameters' dtype.
        window: crop size in pixels, or (height, width).
        stride: pixels from one crop to the next, or (down, right). None: the window; then only the last crops overlap.
        max_crops: so many crops run at a time. None: all of all images.

    Returns:
        Class numbers [B, H, W], contiguous: uint8 up to 256 classes, else int32.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a size that is not positive, a stride above the window, or images that the segmenter refuses.
    """
    if not isinstance(segmenter, StepSegmenter):
        raise TypeError(f"segmenter: expected a StepSegmenter, got {type(segmenter).__name__}")
    check_images(images, segmenter.encoder.vit.embedding.weight)
    window = as_pair("window", window)
    stride = window if stride is None else as_pair("stride", stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride: expected at most the window {window}, or pixels get no label, got {stride}")
    height, width = images.shape[2:]
    size = min(window[0], height), min(window[1], width)
    corners = [(y, x) for y, x in itertools.product(*map(window_starts, (height, width), size, stride))]
    crops = [image[:, y : y + size[0], x : x + size[1]] for image in images for y, x in corners]
    most = len(crops) if max_crops is None else check_int("max_crops", max_crops, minimum=1)
    batches = (torch.stack(crops[start : start + most]) for start in range(0, len(crops), most))
    if len(corners) == 1:
        return torch.cat([segmenter.predict(batch) for batch in batches])
    scores = torch.cat([segmenter(batch) for batch in batches])
    patch_size = segmenter.encoder.vit.patch_size
    axes = zip(scores.shape[2:], size, strict=True)
    vertical, horizontal = (bilinear_axis(cells, max(cells * patch_size, own), scores) for cells, own in axes)
    dtype = torch.uint8 if scores.shape[1] <= 256 else torch.int32
    labels = images.new_empty(images.shape[0], height, width, dtype=dtype)
    for own, out in zip(scores.unflatten(0, (-1, len(corners))), labels, strict=True):
        label_image(own, corners, size, (vertical, horizontal), out)
    return labels


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the crops along one axis: every ``stride``, and one that ends with the axis."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def as_pair(name: str, value: object) -> tuple[int, int]:
    """(height, width) of an int or a pair."""
    return check_grid(name, value if isinstance(value, (tuple, list)) else (value, value))


def bilinear_axis(cells: int, pixels: int, like: Tensor) -> Axis:
    """For each pixel along one axis: its lower and upper cell and the upper one's weight, as `upsample_argmax`'s."""
    groups = taps(cells, pixels, torch.device("cpu"), accumulator(like.dtype))
    lower, upper = groups.output.new_empty(2, pixels)
    weight = groups.weight.new_empty(pixels)
    lower[groups.output] = groups.first[:, None].expand_as(groups.output)
    upper[groups.output] = groups.second[:, None].expand_as(groups.output)
    weight[groups.output] = groups.weight
    return lower.to(like.device), upper.to(like.device), weight.to(like.device)


def label_image(
    scores: Tensor, corners: list[tuple[int, int]], size: tuple[int, int], axes: tuple[Axis, Axis], labels: Tensor
) -> None:
    """Write the labels [H, W] of one image; scores [crops, C, rows, cols]."""
    (height, width), wide = labels.shape, accumulator(scores.dtype)
    most = max(1, SCORES_AT_A_TIME // (scores.shape[1] * width))
    for top, bottom in bands([y for y, _ in corners], size[0], height, most):
        # A pixel's crops are the same for all classes: the sum has its maximum where the average has it.
        sums = scores.new_zeros(scores.shape[1], bottom - top, width, dtype=wide)
        for crop, (y, x) in zip(scores, corners, strict=True):
            if y <= top and bottom <= y + size[0]:
                tall = stretch(crop.to(wide), axes[0], 1, slice(top - y, bottom - y))
                sums[:, :, x : x + size[1]] += stretch(tall, axes[1], 2, slice(size[1]))
        labels[top:bottom] = sums.max(0).indices


def bands(starts: list[int], window: int, height: int, most: int) -> list[tuple[int, int]]:
    """(top, bottom) of at most ``most`` rows, cut where crops begin and end: a crop covers a band or misses it."""
    cuts = sorted({0, height, *starts, *(start + window for start in starts)})
    return [(top, min(top + most, end)) for begin, end in itertools.pairwise(cuts) for top in range(begin, end, most)]


def stretch(scores: Tensor, axis: Axis, dim: int, pixels: slice) -> Tensor:
    """Some pixels of a dimension upsampled bilinearly."""
    lower, upper, weight = (part[pixels] for part in axis)
    weight = weight.view([-1 if i == dim else 1 for i in range(scores.dim())])
    low, high = scores.index_select(dim, lower), scores.index_select(dim, upper)
    return low.mul_(1 - weight).add_(high.mul_(weight))
