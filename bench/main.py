"""The main job: photographs through one segmenter, dense in plain PyTorch, merged, and merged with exits.

All share one output tail, `upsample_argmax`, so that a faster tail is not credited to saved tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from step_kernels import upsample_argmax
from step_kernels.model import VariancePolicy

from .engine import Case, Contender
from .images import VIEWS, Pictures, squares, view
from .layouts import HALT_SHARE, REDUCTION, recorded
from .options import PATCH_SIZE, Options
from .segmenters import DENSE, MERGED, MERGED_EXITS, Segmenters, confidences, dense_scores, draw_weights, threshold_for

SECONDS = 25.0
PICTURE = "supertokens.png"


def cases(options: Options) -> Iterator[Case]:
    """One for each model, size and batch that was asked for."""
    for vit, size, batch in itertools.product(options.vit, options.size, options.batch):
        _, own = photographed(options, vit, size, batch)
        ours = {family: functools.partial(ours_of, options, own, family) for family in (MERGED, MERGED_EXITS)}
        contenders, shape = {DENSE: functools.partial(dense, own), **ours}, {"vit": vit, "size": size, "batch": batch}
        yield Case("photographs", shape, len(own.inputs), own.expected(DENSE), contenders, fixed=options.fixed)


def notes(options: Options) -> list[str]:
    """What a reader must know of the inputs and of what is timed."""
    pictures, segmenters = photographed(options, options.vit[0], options.size[0], options.batch[0])
    given = options.policy == "given"
    policy = "Layouts are given: no policy is timed." if given else "The variance policy runs inside the time."
    return [
        f"Images: {', '.join(pictures.names)}; {len(segmenters.inputs)} inputs rotate, the same mirrored and turned.",
        *pictures.messages,
        f"{policy} It is calibrated to {REDUCTION:g} times fewer tokens and the exit to {HALT_SHARE:.0%} of them halting; weights are random, "
        "and contenders repeat recorded decisions. Every time has the same output tail, upsample_argmax.",
    ]


def picture(options: Options) -> Path:
    """Draws the decisions on the first photographs; ImportError without matplotlib."""
    pictures, segmenters = photographed(options, options.vit[0], options.size[0], options.batch[0])
    segmenters.traces[0].figure(pictures.pixels, pictures.names).savefig(options.out / PICTURE, dpi=140)
    return options.out / PICTURE


def dense(own: Segmenters) -> Contender:
    """Plain PyTorch with SDPA, no op of the package before the tail."""

    @torch.no_grad()
    def labels(number: int) -> Tensor:
        return upsample_argmax(dense_scores(own.weights, own.inputs[number]), own.size)

    return own.contender(DENSE, labels, ours=False, note="PyTorch, eager")


def ours_of(options: Options, own: Segmenters, family: str) -> Contender:
    asked = options.policy != "given"
    return own.contender(family, own.eager(family, ask=asked), ours=True, note="" if asked else "layouts given")


@functools.cache
def photographed(options: Options, vit: str, size: int, batch: int) -> tuple[Pictures, Segmenters]:
    """The photographs, and the segmenters that are calibrated on them; kept for the notes and the picture."""
    pictures = squares(batch, size, options.images)
    inputs = tuple(view(pictures.tensor(), n).to(options.device, options.dtype) for n in range(VIEWS))
    policy = VariancePolicy.calibrate(torch.cat(inputs).float(), reduction=REDUCTION, patch_size=PATCH_SIZE)
    weights = dataclasses.replace(draw_weights(options, vit, size), policy=policy.eval())
    ((block, head),), prefix = weights.exits.items(), weights.vit.num_prefix
    layouts = [policy(images, patch_size=PATCH_SIZE, num_prefix=prefix).trim() for images in inputs]
    wide = weights.to(dtype=torch.float32)  # rounding to a narrow dtype would leave few different confidences
    sure = [confidences(wide, images.float(), layout) for images, layout in zip(inputs, layouts, strict=True)]
    threshold = threshold_for(torch.cat(sure), HALT_SHARE)
    head.threshold.fill_(threshold)
    traces = [recorded(layout, block, own > threshold) for layout, own in zip(layouts, sure, strict=True)]
    return pictures, Segmenters(weights, inputs, tuple(traces))
