"""Reference of the output tail: bilinear upsampling and argmax, a strip of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import accumulator

STRIP_ELEMENTS = 1 << 20  # upsampled logits that exist at a time


def upsample_argmax(canvas: Tensor, height: int, width: int) -> Tensor:
    batch_size, classes, rows, cols = canvas.shape
    dtype = torch.uint8 if classes <= 256 else torch.int32
    labels = torch.empty(batch_size, height, width, dtype=dtype, device=canvas.device)
    sums = accumulator(canvas.dtype)
    top, bottom, weight_y = _taps(rows, height, canvas.device, sums)
    left, right, weight_x = _taps(cols, width, canvas.device, sums)
    weight_x, weight_y = weight_x[:, None], weight_y[:, None, None]
    strip = max(1, STRIP_ELEMENTS // max(1, width * classes))
    for image, out in zip(canvas.permute(0, 2, 3, 1), labels, strict=True):  # [rows, cols, C]: argmax runs along memory
        for first in range(0, height, strip):
            ys = slice(first, min(first + strip, height))
            lowest = _source_row(first, rows, height)
            source = image[lowest : _source_row(ys.stop - 1, rows, height) + 3].to(sums)
            wide = source.index_select(1, left) * (1 - weight_x)
            wide.addcmul_(source.index_select(1, right), weight_x)
            upsampled = wide.index_select(0, top[ys] - lowest) * (1 - weight_y[ys])
            upsampled.addcmul_(wide.index_select(0, bottom[ys] - lowest), weight_y[ys])
            out[ys] = upsampled.argmax(-1)
    return labels


def _taps(size: int, upsampled: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The two source indices of each output index, and the weight of the second (align_corners=False)."""
    position = (torch.arange(upsampled, device=device, dtype=dtype) + 0.5) * (size / upsampled) - 0.5
    position.clamp_(0, size - 1)
    first = position.long()
    return first, (first + 1).clamp(max=size - 1), position - first


def _source_row(y: int, rows: int, height: int) -> int:
    """The first source row of output row y, or the one before: the taps' own rounding may differ, so a strip takes a row more."""
    return min(max(int((y + 0.5) * (rows / height) - 0.5 - 1e-3), 0), rows - 1)
