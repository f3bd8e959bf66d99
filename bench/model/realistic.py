"""Layouts as photographs make them: the training-free variance policy on different crops, merged 2.5 times on average.

Crops are never enlarged. Where photographs are too small for a grid of patches of 16 pixels, the policy looks at patches of 8 or 4
pixels: a layout says which cells are merged, not how many pixels they have. Where there are fewer crops than images, mirrored and
turned ones follow, so that no image comes twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from step_kernels import SupertokenLayout, use_backend
from step_kernels.model import VariancePolicy

from ..errors import UsageError
from ..images import VIEWS, load_photographs, view
from ..kernels.layouts import REDUCTION

PATCHES = (16, 8, 4)  # pixels, as large as the photographs allow


def draw_layouts(count: int, batch: int, grid: tuple[int, int], *, num_prefix: int) -> list[SupertokenLayout]:
    """`count` batches of trimmed layouts on the CPU, of different pictures.

    Args:
        count, batch: how many.
        grid: (rows, cols), square.
        num_prefix: of the layouts.

    Raises:
        UsageError: there are not enough pictures.
    """
    pictures, patch = _pictures(count * batch, grid[0])
    with use_backend("reference"):
        policy = VariancePolicy.calibrate(pictures, reduction=REDUCTION, patch_size=patch)
        return [policy(own, patch_size=patch, num_prefix=num_prefix).trim() for own in pictures.split(batch)]


def source() -> str | None:
    """What stands in for photographs where they cannot be read, as a sentence; None where they can."""
    photographs = load_photographs(None, size=PATCHES[-1], batch=1)
    return (
        f"Realistic layouts are those of no photographs: {photographs.messages[0]}" if photographs.generated else None
    )


def _pictures(count: int, cells: int) -> tuple[Tensor, int]:
    """[count, 3, cells * patch, cells * patch], and the side of a patch in pixels."""
    for patch in PATCHES:
        try:
            crops = load_photographs(None, size=cells * patch, batch=None, most=count).tensor()
        except UsageError:
            if patch == PATCHES[-1]:
                raise
            continue
        if 2 * len(crops) >= count or patch == PATCHES[-1]:
            break
    if VIEWS * len(crops) < count:
        raise UsageError(
            f"realistic layouts need {count} different pictures, {len(crops)} crops give {VIEWS * len(crops)}"
        )
    views = [view(crops, number) for number in range(-(-count // len(crops)))]
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))  # not a batch of crops of one photograph
    return torch.cat(views)[:count][mixed], patch
