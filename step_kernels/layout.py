"""Which supertoken covers which cells of each image's patch grid: data that lives on the device.

The layout is the one thing all ops share. Its token count is a device value, so nothing here waits for the host unless asked to
(``num_tokens`` of an untrimmed layout, ``trim``, ``from_sides``, ``validate``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .checks import (
    Size,
    check_capacity,
    check_choice,
    check_device,
    check_grid,
    check_int,
    check_side,
    check_sides,
    check_tensor,
    check_thresholds,
)
from .library import define
from .validation import validate_layout

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class SupertokenLayout:
    """The supertokens of a batch of images, packed one image after another.

    The order of an image's tokens: prefix tokens, then its blocks by their top-left cell in raster order. Blocks never overlap; before
    any halting they tile the grid. A block is aligned to its side (a power of two up to 64) and wholly inside the grid.

    Attributes:
        cu_seqlens: int32 [B + 1]; the tokens of image b are rows ``cu_seqlens[b]:cu_seqlens[b + 1]``; the last entry is the live row count.
        cells: int32 [capacity, 4]; image, row and column of the top-left cell, side in cells. Prefix tokens: [image, 0, 0, 0].
            Rows past the live count: zeros.
        grid: (rows, cols), the patch grid of one image.
        num_prefix: prefix tokens (CLS, registers) at the start of every image; never merged, halted or scattered.
        trimmed: capacity equals the live count.
        expected_tokens: the host's estimate of the live row count of an untrimmed layout, say from an earlier run; None: no idea. Kernels
            choose tile sizes by it. Only speed depends on it, never a result beyond rounding, so any value from 0 up is legal. None in
            the layout of an exit's survivors, whose count is another one.

    Raises:
        TypeError, ValueError: a field of the wrong type, dtype, shape or device, or a tensor that is not contiguous.
    """

    cu_seqlens: Tensor
    cells: Tensor
    grid: tuple[int, int]
    num_prefix: int = 0
    trimmed: bool = False
    expected_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, field, shape in (("cu_seqlens", self.cu_seqlens, ("B + 1",)), ("cells", self.cells, ("capacity", 4))):
            check_tensor(name, field, shape, dtypes=(torch.int32,))
            if not field.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(field.stride())}")
        check_device("cells", self.cells, self.cu_seqlens.device, "cu_seqlens")
        object.__setattr__(self, "grid", check_grid("grid", self.grid))
        check_int("num_prefix", self.num_prefix, minimum=0)
        check_choice("trimmed", self.trimmed, (True, False))
        if self.expected_tokens is not None:
            object.__setattr__(self, "expected_tokens", check_int("expected_tokens", self.expected_tokens, minimum=0))
        if self.cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens: expected at least 1 entry (B + 1), got 0")

    @property
    def batch_size(self) -> int:
        """Number of images, B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def capacity(self) -> int:
        """Rows of every tensor of tokens that goes with this layout."""
        return self.cells.shape[0]

    @property
    def num_tokens(self) -> int:
        """Live rows. Untrimmed: reads the device each time (one sync) and never caches: a cached count goes stale on graph replay.

        Raises:
            RuntimeError: untrimmed, during CUDA graph capture.
        """
        if self.trimmed:
            return self.capacity
        # While compiling nothing is captured, and to ask could not be compiled.
        if not torch.compiler.is_compiling() and self.cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("num_tokens of an untrimmed layout reads the device, which CUDA graph capture forbids")
        return int(self.cu_seqlens[-1])

    @property
    def max_seqlen(self) -> int:
        """A static bound on the tokens of one image: num_prefix + rows * cols."""
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def lengths(self) -> Tensor:
        """Tokens of each image, prefix included: int32 [B], on the device."""
        return self.cu_seqlens.diff()

    def sides(self) -> Tensor:
        """The side of the block that covers each cell: int32 [B, rows, cols], 0 where no live token does. Inverse of ``from_sides``."""
        return _layout_sides(self.cu_seqlens, self.cells, *self.grid)

    def to(self, device: torch.device | str) -> SupertokenLayout:
        """The same layout on another device."""
        cu_seqlens, cells = self.cu_seqlens.to(device=device), self.cells.to(device=device)
        return self.trusted(cu_seqlens, cells, self.grid, self.num_prefix, self.trimmed, self.expected_tokens)

    def clone(self) -> SupertokenLayout:
        """The same layout in memory of its own."""
        cu_seqlens, cells = self.cu_seqlens.clone(), self.cells.clone()
        return self.trusted(cu_seqlens, cells, self.grid, self.num_prefix, self.trimmed, self.expected_tokens)

    def image(self, number: int) -> SupertokenLayout:
        """The tokens of one image as a batch of one, trimmed, in memory of its own. One host sync.

        Raises:
            TypeError, ValueError: ``number`` is no image of the batch.
        """
        cells = self.cells[self.image_rows(number)].clone()
        cells[:, 0] = 0
        cu_seqlens = self.cu_seqlens.new_tensor([0, cells.shape[0]])
        return self.trusted(cu_seqlens, cells, self.grid, self.num_prefix, trimmed=True)

    def image_rows(self, number: int) -> slice:
        """The rows of one image's tokens. One host sync."""
        check_int("number", number, minimum=0, maximum=self.batch_size - 1)
        return slice(*self.cu_seqlens[number : number + 2].tolist())

    def trim(self) -> SupertokenLayout:
        """The same layout with its capacity cut to the live count (one host sync; none when trimmed already)."""
        if self.trimmed:
            return self
        cells = self.cells[: self.num_tokens]
        return self.trusted(self.cu_seqlens, cells, self.grid, self.num_prefix, trimmed=True)

    @classmethod
    def trusted(
        cls,
        cu_seqlens: Tensor,
        cells: Tensor,
        grid: tuple[int, int],
        num_prefix: int,
        trimmed: bool = False,
        expected_tokens: int | None = None,
    ) -> SupertokenLayout:
        """A layout without the constructor's checks: for fields that an op has made, or that another layout held."""
        layout = object.__new__(cls)
        fields = (cu_seqlens, cells, grid, num_prefix, trimmed, expected_tokens)
        for name, value in zip(cls.__dataclass_fields__, fields, strict=True):
            object.__setattr__(layout, name, value)
        return layout

    @classmethod
    def uniform(
        cls,
        batch_size: int,
        grid: tuple[int, int],
        *,
        side: int = 1,
        num_prefix: int = 0,
        device: torch.device | str | None = None,
    ) -> SupertokenLayout:
        """Every block of the same side; ``side=1`` is the ordinary, unmerged patch grid. Trimmed.

        Raises:
            TypeError, ValueError: the grid is not divisible by the side, or a number is out of range or of a wrong type.
        """
        check_int("batch_size", batch_size, minimum=0)
        rows, cols = check_grid("grid", grid)
        check_side("side", side)
        check_int("num_prefix", num_prefix, minimum=0)
        if rows % side or cols % side:
            raise ValueError(f"grid: expected rows and cols divisible by side {side}, got {(rows, cols)}")
        check_capacity(batch_size, rows, cols, num_prefix)
        length = num_prefix + (rows // side) * (cols // side)
        cells = torch.zeros(batch_size, length, 4, dtype=torch.int32, device=device)
        index = torch.arange(length - num_prefix, dtype=torch.int32, device=device)
        cells[..., 0] = torch.arange(batch_size, dtype=torch.int32, device=device)[:, None]
        cells[:, num_prefix:, 1] = index.div(cols // side, rounding_mode="floor") * side
        cells[:, num_prefix:, 2] = index % (cols // side) * side
        cells[:, num_prefix:, 3] = side
        cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length
        return cls.trusted(cu_seqlens, cells.flatten(0, 1), (rows, cols), num_prefix, trimmed=True)

    @classmethod
    def from_sides(cls, sides: Tensor, *, num_prefix: int = 0) -> SupertokenLayout:
        """The layout in which ``sides[b, r, c]`` is the side of the block that covers cell (r, c) of image b. Untrimmed.

        Args:
            sides: integer [B, rows, cols]; 0 where no token covers the cell (as after halting).
            num_prefix: prefix tokens of every image.

        Raises:
            TypeError: sides is no integer tensor.
            ValueError: names the first cell, in raster order, that belongs to no aligned block of its side. The check reads
                the values (one host sync); it is left out during CUDA graph capture, which forbids that.
        """
        check_tensor("sides", sides, ("B", "rows", "cols"), dtypes=INTEGERS)
        batch_size, rows, cols = sides.shape
        check_grid("sides.shape[1:]", (rows, cols))
        check_int("num_prefix", num_prefix, minimum=0)
        check_capacity(batch_size, rows, cols, num_prefix)
        cu_seqlens, cells = _layout_from_sides(sides, num_prefix)
        return cls.trusted(cu_seqlens, cells, (rows, cols), num_prefix)

    def validate(self) -> None:
        """Check the values too: cu_seqlens monotone and within capacity, cells aligned, inside the grid, ordered, not overlapping.

        One host sync. Every op does this first when ``STEP_KERNELS_CHECK=1``.

        Raises:
            ValueError: names the field, the first bad row, what was expected and what came.
        """
        validate_layout(self.cu_seqlens, self.cells, self.grid, self.num_prefix, self.trimmed)


# Layouts are data: torch.load reads them with its default, weights_only=True.
torch.serialization.add_safe_globals([SupertokenLayout])


def resolve_layout(
    scores: Sequence[Tensor],
    *,
    sides: Sequence[int],
    thresholds: float | Tensor | Sequence[float | Tensor],
    grid: tuple[int, int],
    num_prefix: int = 0,
) -> SupertokenLayout:
    """Turn a policy's scores into a layout, coarse to fine: STEP's dCTS decision (arXiv 2509.14165).

    A block of side s is taken when its score exceeds that side's threshold and no coarser taken block covers it; cells that no block
    takes become side-1 tokens. Scores and thresholds are compared as fp32; NaN is never taken. Equivalent, for one image::

        for s in sorted(sides, reverse=True):
            for r, c in blocks(s):
                if score[s][r, c] > threshold[s] and not covered[r * s, c * s]:
                    take(r * s, c * s, s)

    Args:
        scores: one floating-point tensor per side, ``scores[i]`` [B, rows // sides[i], cols // sides[i]].
        sides: powers of two from 2 to 64, each once, in any order.
        thresholds: one float or 0-dim device tensor for all sides, or a sequence of one per side.
        grid: (rows, cols). A side need not divide it: cells past the last whole block stay side-1 tokens.
        num_prefix: prefix tokens of every image.

    Returns:
        An untrimmed layout of capacity B * (num_prefix + rows * cols). No host sync.

    Raises:
        TypeError, ValueError: see ``checks``; also if scores, sides and thresholds differ in number or batch size.
    """
    rows, cols = check_grid("grid", grid)
    check_int("num_prefix", num_prefix, minimum=0)
    if isinstance(scores, Tensor) or not isinstance(scores, (list, tuple)) or not scores:
        raise TypeError(f"scores: expected a non-empty list of tensors, one per side, got {checks.describe(scores)}")
    sides = check_sides("sides", sides, minimum=2)
    if len(sides) != len(scores):
        raise ValueError(f"sides: expected {len(scores)} entries, one per tensor in scores, got {len(sides)}")
    first = check_tensor("scores[0]", scores[0], ("B", "rows // side", "cols // side"))
    for i, (score, side) in enumerate(zip(scores, sides, strict=True)):
        shape = (first.shape[0], rows // side, cols // side)
        check_tensor(f"scores[{i}]", score, shape)
        check_device(f"scores[{i}]", score, first.device, "scores[0]")
    check_capacity(first.shape[0], rows, cols, num_prefix)
    numbers, tensors = check_thresholds(thresholds, len(scores), first.device)
    detached = [score.detach() for score in scores]
    cu_seqlens, cells = _resolve_layout(detached, list(sides), numbers, tensors, rows, cols, num_prefix)
    return SupertokenLayout.trusted(cu_seqlens, cells, (rows, cols), num_prefix)


def check_layout(layout: object, like_name: str, like: Tensor) -> SupertokenLayout:
    """``layout`` if it is one, on the device of ``like``; checks its values too under ``STEP_KERNELS_CHECK=1``."""
    if not isinstance(layout, SupertokenLayout):
        raise TypeError(f"layout: expected a SupertokenLayout, got {checks.describe(layout)}")
    if not isinstance(like, Tensor):
        raise TypeError(f"{like_name}: expected a tensor, got {checks.describe(like)}")
    check_device("layout", layout.cu_seqlens, like.device, like_name)
    if checks.values():
        layout.validate()
    return layout


def check_rows(name: str, x: Tensor, shape: tuple[Size, ...], layout: SupertokenLayout | None) -> Tensor | None:
    """x of that shape, whose rows are those of the layout; the cu_seqlens that tell the live ones, None when all are."""
    if layout is None:
        check_tensor(name, x, shape, contiguous_last=True)
        return None
    check_layout(layout, name, x)
    check_tensor(name, x, (layout.capacity, *shape[1:]), contiguous_last=True)
    return None if layout.trimmed else layout.cu_seqlens


def _fake_layout(like: Tensor, rows: int, cols: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    batch_size = like.shape[0]
    capacity = batch_size * (num_prefix + rows * cols)
    return (
        like.new_empty(batch_size + 1, dtype=torch.int32),
        like.new_empty(capacity, 4, dtype=torch.int32),
    )


_layout_from_sides = define(
    "layout_from_sides(Tensor sides, int num_prefix) -> (Tensor, Tensor)",
    module="layout",
    fake=lambda sides, num_prefix: _fake_layout(sides, sides.shape[1], sides.shape[2], num_prefix),
)
_layout_sides = define(
    "layout_sides(Tensor cu_seqlens, Tensor cells, int rows, int cols) -> Tensor",
    module="layout",
    fake=lambda cu_seqlens, cells, rows, cols: cells.new_empty(cu_seqlens.shape[0] - 1, rows, cols),
)
_resolve_layout = define(
    "resolve_layout(Tensor[] scores, int[] sides, float[] thresholds, Tensor[] threshold_tensors, int rows, int cols, "
    "int num_prefix) -> (Tensor, Tensor)",
    module="layout",
    fake=lambda scores, sides, numbers, tensors, rows, cols, num_prefix: _fake_layout(
        scores[0], rows, cols, num_prefix
    ),
)
