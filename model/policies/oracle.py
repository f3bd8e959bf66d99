"""OraclePolicy: perfect decisions from a label map, the bound for learned policies and what they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ...checks import check_int, check_sides, check_tensor
from ...layout import INTEGERS
from ..images import patch_grid
from .base import SIDES, Policy, fitting_sides, grid_of, quarters

__all__ = ["OraclePolicy", "block_purity"]

MIXED, PURE, UNLABELLED = 0, 1, -1


class OraclePolicy(Policy):
    """Perfect decisions from a label map: a block is taken when its labelled pixels hold one class.

    Pixels of ``ignore_index`` do not count, nor do those that padding adds; a block without any labelled pixel is taken.
    An upper bound for learned policies, and what `PolicyNet` is trained on, as in CTS (Lu et al., CVPR 2023).

    Args:
        labels: integer [B, H, W], H and W those of the images before padding; kept as a buffer outside the state dict.
        sides: as in `Policy`.
        ignore_index: the label of pixels without a class; one that the dtype of ``labels`` cannot hold ignores none.

    Raises:
        TypeError: labels of a wrong type or dtype, ``sides`` or ``ignore_index`` of a wrong type.
        ValueError: labels of a wrong shape, ``sides`` as in `Policy`; when called, images of another number or size.
    """

    settings = ("sides", "ignore_index")
    labels: Tensor

    def __init__(self, labels: Tensor, *, sides: Sequence[int] = SIDES, ignore_index: int = 255) -> None:
        super().__init__(sides)
        check_tensor("labels", labels, ("B", "H", "W"), dtypes=INTEGERS)
        limits = torch.iinfo(torch.int64)
        self.ignore_index = check_int("ignore_index", ignore_index, minimum=limits.min, maximum=limits.max)
        self.register_buffer("labels", labels, persistent=False)

    @classmethod
    def from_labels(cls, labels: Tensor, *, sides: Sequence[int] = SIDES, ignore_index: int = 255) -> Self:
        """The policy for the images that ``labels`` belong to. Arguments and errors: those of the class."""
        return cls(labels, sides=sides, ignore_index=ignore_index)

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        """1 for blocks of one class, 0 for the others."""
        rows, cols = grid_of(images, patch_size)
        batch, height, width = self.labels.shape
        if batch != images.shape[0] or patch_grid(height, width, patch_size) != (rows, cols):
            raise ValueError(
                f"images: expected the {batch} images of the labels, {height} x {width} before padding, "
                f"got shape {list(images.shape)}"
            )
        purity = block_purity(self.labels, self.sides, patch_size=patch_size, ignore_index=self.ignore_index)
        return [(found != MIXED).float() for found in purity]

    def score_thresholds(self, sides: Sequence[int]) -> float:
        return 0.5


def block_purity(
    labels: Tensor, sides: Sequence[int] = SIDES, *, patch_size: int, ignore_index: int = 255
) -> list[Tensor]:
    """Which blocks of patches hold one class: what the policy learns to say.

    Source: the labels of CTS's policy network (Lu et al., CVPR 2023), for several sides.

    Args:
        labels: integer [B, H, W], of images before padding.
        sides: block sides in patches, powers of two from 2 to 64.
        patch_size: pixels per side of a patch.
        ignore_index: the label of pixels that do not count, nor do those that padding adds; one that the dtype of
            ``labels`` cannot hold ignores none.

    Returns:
        int8 [B, rows // side, cols // side] for each side that fits the grid, ascending: 1 where all labelled pixels are of
        one class, 0 where they are not, -1 where no pixel is labelled. No gradient, no host sync.

    Raises:
        TypeError, ValueError: labels of a wrong type, dtype or shape; a side that is no such power of two, or comes twice.
    """
    check_tensor("labels", labels, ("B", "H", "W"), dtypes=INTEGERS)
    sides = check_sides("sides", sides)
    grid = patch_grid(labels.shape[1], labels.shape[2], check_int("patch_size", patch_size, minimum=1))
    ignored = labels.long() == ignore_index  # a narrower comparison wraps: int8 -1 would equal 255
    limits = torch.iinfo(labels.dtype)
    lowest = by_patches(labels.masked_fill(ignored, limits.max), grid, patch_size, limits.max).amin((2, 4))
    highest = by_patches(labels.masked_fill(ignored, limits.min), grid, patch_size, limits.min).amax((2, 4))
    labelled = by_patches(~ignored, grid, patch_size, False).amax((2, 4))
    side, maps = 1, []
    for wanted in fitting_sides(sides, grid):
        while side < wanted:
            side *= 2
            lowest, highest = quarters(lowest).amin((2, 4)), quarters(highest).amax((2, 4))
            labelled = quarters(labelled).amax((2, 4))
        maps.append(torch.where(labelled, (highest <= lowest).to(torch.int8), UNLABELLED))
    return maps


def by_patches(pixels: Tensor, grid: tuple[int, int], patch_size: int, fill: float) -> Tensor:
    """[B, H, W], padded with ``fill`` -> [B, rows, patch_size, cols, patch_size]."""
    # Not F.pad, whose fill value passes through a double: the limits of int64 would change.
    rows, cols = grid
    padded = pixels.new_full((pixels.shape[0], rows * patch_size, cols * patch_size), fill)
    padded[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return padded.unflatten(2, (cols, patch_size)).unflatten(1, (rows, patch_size))
