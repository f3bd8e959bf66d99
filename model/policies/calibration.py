"""Calibration: how many tokens each threshold leaves, counted over any number of images of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_tensor, describe

__all__ = ["TokenCounts", "batches_of"]


def batches_of(images: object) -> Iterator[Tensor]:
    """[B, C, H, W] each, of a tensor or an iterable of pictures or batches; of a tuple or list, as loaders yield, the first entry."""
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected a tensor or an iterable of them, got {describe(images)}")
    named = [("images", images)] if isinstance(images, Tensor) else ((f"images[{i}]", x) for i, x in enumerate(images))
    for name, item in named:
        found = item[0] if isinstance(item, (tuple, list)) and item else item
        if isinstance(found, Tensor) and found.ndim == 3:
            found = found[None]
        yield check_tensor(name, found, ("B", "C", "H", "W"))


class TokenCounts:
    """Tokens as a function of the threshold, from the deviations of blocks: two numbers for each block are kept, no image.

    A block counts when its deviation is below the threshold and no coarser block around it is: its side * side cells become
    one token from its own deviation on, up to the smallest one around it.
    """

    def __init__(self) -> None:
        self.cells = 0
        self.steps: list[tuple[Tensor, Tensor]] = []  # deviations at which the count changes, and by how much

    def add(self, deviations: Sequence[Tensor], sides: Sequence[int], cells: int) -> None:
        """One batch of ``cells`` patches: deviations [B, rows // side, cols // side] per side, ascending."""
        self.cells += cells
        values, changes = list[Tensor](), list[Tensor]()
        around, coarser = None, 0
        for own, side in reversed(list(zip(deviations, sides, strict=True))):
            own = own.float().nan_to_num(nan=torch.inf, posinf=torch.inf)  # NaN is below no threshold
            limit = torch.full_like(own, torch.inf)
            if around is not None:
                spread = around.repeat_interleave(coarser // side, 1).repeat_interleave(coarser // side, 2)
                limit[:, : spread.shape[1], : spread.shape[2]] = spread
            saved = (own < limit).flatten().long() * (side * side - 1)
            values += [own.flatten(), limit.flatten()]
            changes += [-saved, saved]
            around, coarser = torch.minimum(own, limit), side
        if values:
            self.steps.append(summed(values, changes))

    def threshold(self, reduction: float) -> Tensor:
        """The threshold that leaves about ``reduction`` times fewer tokens than cells, as close as the images allow."""
        if not self.steps:
            return torch.zeros((), device="cpu")
        values, changes = summed([values for values, _ in self.steps], [changes for _, changes in self.steps])
        changes, values = changes[values.isfinite()], values[values.isfinite()]
        left = self.cells + F.pad(changes.cumsum(0), (1, 0))  # below all deviations, then above each
        excess = left.double() - self.cells / reduction
        first = int((excess > 0).sum().clamp(max=len(left) - 1))  # the counts never rise
        best = first - int(first > 0 and bool(excess[first - 1].abs() <= excess[first].abs()))
        if best in (0, len(values)):
            return values[best - 1] + 1 if best else values.new_zeros(())
        below, above = values[best - 1], values[best]
        return torch.where((below + above) / 2 > below, (below + above) / 2, above)  # one rounding step apart


def summed(values: list[Tensor], changes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The distinct values, ascending, and the sum of the changes at each."""
    distinct, index = torch.cat(values).unique(return_inverse=True)
    return distinct, torch.zeros_like(distinct, dtype=torch.int64).index_add_(0, index, torch.cat(changes))
