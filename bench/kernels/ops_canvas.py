"""The ops on the patch grid: scatter-back, a canvas in place, and labels at image size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from step_kernels import scatter_back, scatter_into, upsample_argmax

from ..gate import UPSAMPLING_ROUNDINGS
from . import plain
from .examples import Example, Source
from .operation import Operation, Outputs, beyond_any_cache, block_rows, covered_cells, layout_bytes, nbytes, whole


def _values(source: Source, channels: int) -> Example:
    tensors = {
        "values": source.random(source.live, channels),
        "gradient": source.random(source.shape.batch, *source.shape.grid, channels).permute(0, 3, 1, 2),
    }
    return Example(source.layout, tensors, packed=frozenset({"values"}))


def _scatter_back_bytes(example: Example) -> int:
    """Prefix rows hold nothing for the canvas; the canvas has the gradient's size."""
    blocks = example["values"][: block_rows(example.layout)]
    return nbytes(blocks, example["gradient"]) + layout_bytes(example.layout)


def _scatter_back_backward_bytes(example: Example) -> int:
    return nbytes(example["gradient"], example["values"]) + layout_bytes(example.layout)


def _scatter_back(channels: str) -> Operation:
    return Operation(
        name="scatter_back",
        shown=("values",),
        registered=("scatter_back",),
        make=lambda source: _values(source, getattr(source.shape, channels)),
        ours=lambda e: scatter_back(e["values"], e.layout),
        live=whole,
        plain=(plain.scatter_back, plain.scatter_back_by_side),
        arguments=lambda e: (e["values"], e.layout.cells, e.layout.batch_size, e.layout.grid),
        necessary_bytes=_scatter_back_bytes,
        gradients=("values",),
        registered_backward=("scatter_back_backward",),
        backward_bytes=_scatter_back_backward_bytes,
    )


def _selected_values(source: Source) -> Example:
    where, values = source.halted(), source.random(source.live, source.shape.classes)
    tensors = {"values": values, "where": where, **source.canvas(source.shape.classes)}
    return Example(source.layout, tensors, packed=frozenset({"values", "where"}))


def _scatter_into_bytes(example: Example) -> int:
    where, canvas = example["where"], example["canvas"]
    cell = canvas.shape[1] * canvas.element_size()
    selected = nbytes(example["values"][: int(where.sum())])
    return selected + nbytes(where) + layout_bytes(example.layout) + covered_cells(example.layout, where) * cell


SCATTER_INTO = Operation(
    name="scatter_into",
    shown=("canvas", "values"),
    registered=("scatter_into",),
    make=_selected_values,
    ours=lambda e: scatter_into(e["canvas"], e["values"], e.layout, where=e["where"]),
    live=whole,
    plain=(plain.scatter_into, plain.scatter_into_by_mask),
    arguments=lambda e: (e["canvas"], e["values"], e["where"], e.layout.cells),
    necessary_bytes=_scatter_into_bytes,
)


def _class_scores(source: Source) -> Example:
    canvas = source.random(source.shape.batch, *source.shape.grid, source.shape.classes).permute(0, 3, 1, 2)
    return Example(source.layout, {"scores": canvas}, size=source.shape.size)


def _scores_of(outputs: Outputs, exact: Example) -> Outputs:
    """The exact upsampled score of each pixel's label, so that a tie within rounding is no mistake; NaN for no class."""
    (labels,) = outputs
    canvas = exact["scores"]
    if labels.shape != (canvas.shape[0], *exact.size):
        return outputs
    chosen = []
    for label, scores in zip(labels.long(), canvas, strict=True):  # one image at a time: full-size scores are large
        upsampled = F.interpolate(scores[None], exact.size, mode="bilinear", align_corners=False)[0]
        known = (label >= 0) & (label < canvas.shape[1])
        score = upsampled.gather(0, label.clamp(0, canvas.shape[1] - 1)[None])[0]
        chosen.append(torch.where(known, score, math.nan))
    return (torch.stack(chosen),)


def _upsample_bytes(example: Example) -> int:
    scores = example["scores"]
    label = 1 if scores.shape[1] <= 256 else 4
    return nbytes(scores) + scores.shape[0] * math.prod(example.size) * label


UPSAMPLE_ARGMAX = Operation(
    name="upsample_argmax",
    shown=("scores",),
    registered=("upsample_argmax",),
    make=_class_scores,
    ours=lambda e: upsample_argmax(e["scores"], e.size),
    live=whole,
    plain=(plain.upsample_argmax,),
    arguments=lambda e: (e["scores"], e.size),
    necessary_bytes=_upsample_bytes,
    judged=_scores_of,
    slack=2 * UPSAMPLING_ROUNDINGS,
)

CLASSES_BACK, TOKENS_BACK = _scatter_back("classes"), _scatter_back("dim")
OPERATIONS = (
    CLASSES_BACK,
    beyond_any_cache(CLASSES_BACK, 10),
    TOKENS_BACK,
    beyond_any_cache(TOKENS_BACK, 4),
    SCATTER_INTO,
    beyond_any_cache(SCATTER_INTO, 24),
    UPSAMPLE_ARGMAX,
)
