"""What becomes of tokens, counted over pictures: one table by side, exit, class and distance to a border, whose sums are all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ... import scatter_back
from ..flops import FlopCount
from ..trace import Trace
from ..train.metrics import Confusion, border_pixels

__all__ = ["BINS", "DISTANCES", "FIELDS", "Census", "Outcome"]

# Of tokens: their number, patches and pixels; pixels with the dense model's label, of the block's most common class, with a label, and
# with the right one, of the model and of the dense one.
FIELDS = ("tokens", "patches", "pixels", "agreeing", "common", "labelled", "right", "dense_right")
DISTANCES = ("a border inside", "1 patch away", "2 patches", "3 or 4", "5 or more")  # Chebyshev's, between patches
STEPS = (0, 1, 2, 3, 3, 4)  # distance in patches to the row of the above
SIDES, BINS = 7, 15  # of powers of two up to 64; of confidences, as many as Guo et al. (arXiv 1706.04599) have


@dataclass(frozen=True)
class Outcome:
    """What became of one picture."""

    trace: Trace  # of a batch of one, on the CPU, trimmed
    predictions: np.ndarray  # class numbers [H, W]
    dense: np.ndarray  # of the same model, which neither merges nor halts
    labels: np.ndarray | None  # the truth, where there is one
    flops: FlopCount
    dense_flops: int


@dataclass
class Census:
    """Sums over pictures; memory does not grow with their number.

    A token's class is the most common one in its block, by the labels or, without them, by the dense model; so are borders. Blocks without any
    label are a class of their own.
    """

    blocks: Sequence[int]  # that exits follow
    classes: Sequence[str]
    patch_size: int
    ignore_index: int
    pictures: int = 0
    gflops: np.ndarray = field(init=False)  # by stage, as `Trace.summary`
    dense_gflops: float = 0.0
    table: np.ndarray = field(init=False)  # int64 [side, exit or the end, class or none, distance, field]
    bins: np.ndarray = field(init=False)  # float64 [exit, bin; tokens, sums of confidence, right ones]
    confusions: tuple[Confusion, ...] = ()  # of the model and of the dense one, where there are labels

    def __post_init__(self) -> None:
        ends, shape = 1 + len(self.blocks), (1 + len(self.classes), len(DISTANCES), len(FIELDS))
        self.table, self.gflops = np.zeros((SIDES, ends, *shape), np.int64), np.zeros(ends)
        self.bins = np.zeros((len(self.blocks), BINS, 3))

    def add(self, seen: Outcome) -> dict[str, Any]:
        """Count one picture; its own figures."""
        layout, classes = seen.trace.layout, len(self.classes)
        height, width = seen.predictions.shape
        numbers = torch.arange(layout.capacity, dtype=torch.float64, device="cpu")[:, None]
        owners = scatter_back(numbers, layout)[0, 0].long().numpy()  # the token of each cell
        of_pixel = owners.repeat(self.patch_size, 0).repeat(self.patch_size, 1)[:height, :width]
        reference = (seen.dense if seen.labels is None else seen.labels).astype(np.int64)
        known = np.ones_like(reference, bool) if seen.labels is None else reference != self.ignore_index

        def pixels(where: np.ndarray) -> np.ndarray:
            return np.bincount(of_pixel[where], minlength=layout.capacity)

        pairs = of_pixel[known] * classes + reference[known]
        by_class = np.bincount(pairs, minlength=layout.capacity * classes).reshape(-1, classes)
        labelled = by_class.sum(1)
        klass = np.where(labelled > 0, by_class.argmax(1), classes)
        side, depth = layout.cells[:, 3].numpy(), self._exits(seen.trace, klass)
        figures = [np.ones_like(klass), side**2, pixels(np.ones_like(known)), pixels(seen.predictions == seen.dense)]
        figures += [by_class.max(1), labelled, pixels(known & (seen.predictions == reference))]
        figures.append(pixels(known & (seen.dense == reference)))
        patch, near = side > 0, self._distances(reference, owners, layout.capacity)
        places = tuple(each[patch] for each in (np.log2(side.clip(1)).astype(int), depth, klass, near))
        own = np.zeros_like(self.table)
        np.add.at(own, places, np.stack(figures, 1)[patch])
        self.table += own
        self.pictures, self.dense_gflops = self.pictures + 1, self.dense_gflops + seen.dense_flops / 1e9
        self.gflops += np.array(seen.flops.stages) / 1e9
        if seen.labels is not None:
            self.confusions = self.confusions or tuple(Confusion(classes, self.ignore_index) for _ in range(2))
            for confusion, found in zip(self.confusions, (seen.predictions, seen.dense), strict=True):
                confusion.add(torch.from_numpy(found.astype(np.int64))[None], torch.from_numpy(reference)[None])
        exits = own.sum((0, 2, 3))
        told = {"width": width, "height": height, "gflops": round(seen.flops.total / 1e9, 4)}
        return told | {name: exits[:, place].tolist() for place, name in enumerate(FIELDS)}

    def _exits(self, trace: Trace, klass: np.ndarray) -> np.ndarray:
        """Of each token the number of its exit, the number of exits for the end; fills the bins."""
        depth, alive = np.full(len(klass), len(self.blocks)), np.arange(len(klass))
        for number, stage in enumerate(trace.stages):
            halted = stage.halted.numpy()
            if stage.confidence is not None and stage.labels is not None:
                confidence, labels = stage.confidence.numpy(), stage.labels.numpy()
                told = (labels >= 0) & (klass[alive] < len(self.classes))
                place = (confidence[told] * BINS).astype(int).clip(0, BINS - 1)
                right = labels[told] == klass[alive][told]
                np.add.at(self.bins[number], place, np.stack([np.ones_like(right), confidence[told], right], 1))
            depth[alive[halted]] = number
            alive = alive[~halted]
        return depth

    def _distances(self, reference: np.ndarray, owners: np.ndarray, capacity: int) -> np.ndarray:
        """Of each token, how far the next patch with a border in it is: rows of `DISTANCES`."""
        borders = border_pixels(torch.from_numpy(reference)[None], 1).float()
        near = F.max_pool2d(borders, self.patch_size, ceil_mode=True)
        distance = torch.full_like(near, len(STEPS) - 1)
        for step in reversed(range(len(STEPS) - 1)):
            size = 2 * step + 1
            distance[F.max_pool2d(near, size, 1, step) > 0] = step
        least = np.full(capacity, len(STEPS) - 1)
        np.minimum.at(least, owners.ravel(), distance.numpy().astype(int).ravel())
        return np.array(STEPS)[least]

    def result(self) -> dict[str, Any]:
        """All of it as JSON can hold it: counts by exit (the end last), for each side, class and distance that occurs."""
        names = {"sides": [str(1 << power) for power in range(SIDES)], "classes": [*self.classes, "no label"]}
        names["distances"] = list(DISTANCES)
        told: dict[str, Any] = {"pictures": self.pictures, "blocks": list(self.blocks)}
        told |= {"gflops": self.gflops.round(4).tolist(), "dense_gflops": round(self.dense_gflops, 4)}
        for (kind, keys), axes in zip(names.items(), ((2, 3), (0, 3), (0, 2)), strict=True):
            sums = self.table.sum(axes) if kind == "sides" else np.moveaxis(self.table.sum(axes), 0, 1)
            told[kind] = {
                name: {one: rows[:, place].tolist() for place, one in enumerate(FIELDS)}
                for name, rows in zip(keys, sums, strict=True)
                if rows.any()
            }
        told["bins"] = {str(block): rows.round(4).tolist() for block, rows in zip(self.blocks, self.bins, strict=True)}
        if self.confusions:
            told["accuracy"] = [each.summary(self.patch_size, self.classes) for each in self.confusions]
        return told
