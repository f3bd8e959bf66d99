"""Which supertoken covers which cells of each image's patch grid: data that lives on the device.

The layout is the one thing all ops share. Its token count is a device value, so nothing here waits for the host unless asked to
(``num_tokens`` of an untrimmed layout, ``trim``, ``from_sides``, ``validate``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .checks import check_capacity, check_choice, check_device, check_grid, check_int, check_side, check_tensor
from .library import define
from .live import live_count
from .validation import validate_layout, validate_lengths

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
SHOWN_IMAGES = 8  # whose tokens are told one by one


@dataclass(frozen=True, eq=False, repr=False)
class SupertokenLayout:
    """The supertokens of a batch of images, packed one image after another.

    The order of an image's tokens: prefix tokens, then its blocks by their top-left cell in raster order. Blocks never overlap; before
    any halting they tile the grid. A block is aligned to its side (a power of two up to 64) and wholly inside the grid.

    ``a == b`` is ``a.equal(b)``: equality of values, which reads them (a host sync on a GPU). Equal layouts have equal hashes.

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
        TypeError, ValueError: a field of the wrong type, dtype, shape or device, or a tensor that is not contiguous. On a CPU, where
            that takes no sync: a ``cu_seqlens`` that does not start at 0, falls, has an image of fewer than ``num_prefix`` tokens, or ends
            past the capacity (before it, of a trimmed layout).
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
        object.__setattr__(self, "num_prefix", check_int("num_prefix", self.num_prefix, minimum=0))
        check_choice("trimmed", self.trimmed, (True, False))
        if self.expected_tokens is not None:
            object.__setattr__(self, "expected_tokens", check_int("expected_tokens", self.expected_tokens, minimum=0))
        if self.cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens: expected at least 1 entry (B + 1), got 0")
        if checks.readable(self.cu_seqlens):
            validate_lengths(self.cu_seqlens, self.capacity, self.num_prefix, self.trimmed)

    def __repr__(self) -> str:
        """One line, without a sync: what only a GPU knows is left out."""
        images = f"{self.batch_size} image{'s' * (self.batch_size != 1)}"
        told = [images, f"grid {self.grid[0]}x{self.grid[1]}"]
        if self.num_prefix:
            told.append(f"prefix {self.num_prefix}")
        known = checks.readable(self.cu_seqlens)
        if known:
            lengths = self.lengths().tolist()
            each = "+".join(map(str, lengths)) or "0"
            told.append(f"tokens {each if len(lengths) <= SHOWN_IMAGES else sum(lengths)}")
        if not (known and self.trimmed):
            told.append(f"capacity {self.capacity}")
        if self.trimmed:
            told.append("trimmed")
        if self.device.type != "cpu":
            told.append(str(self.device))
        return f"SupertokenLayout({', '.join(told)})"

    def equal(self, other: SupertokenLayout) -> bool:
        """Whether ops do the same by both: equal grid, prefix, ``cu_seqlens`` and ``cells``, and so capacity, wherever they lie.

        ``trimmed`` and ``expected_tokens`` say what the host knows, and do not matter. Reads the values: host syncs on a GPU.

        Raises:
            TypeError: ``other`` is no layout.
        """
        if not isinstance(other, SupertokenLayout):
            raise TypeError(f"other: expected a SupertokenLayout, got {checks.describe(other)}")
        if hash(self) != hash(other):
            return False
        other = other.to(self.device)
        return torch.equal(self.cu_seqlens, other.cu_seqlens) and torch.equal(self.cells, other.cells)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SupertokenLayout):
            return NotImplemented
        return self is other or self.equal(other)

    def __hash__(self) -> int:
        return hash((self.grid, self.num_prefix, self.batch_size, self.capacity))

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
        if torch.compiler.is_compiling():  # nothing is captured meanwhile
            return live_count(self.cu_seqlens)
        if self.cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
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

    def log_sizes(self) -> Tensor:
        """The logarithm of the number of cells of each token: float32 [capacity], on the device.

        0 for prefix tokens, which cover none and count as one, and for rows past the live count. As ``key_bias`` of
        ``ragged_attention`` it gives ToMe's proportional attention (arXiv 2210.09461): a block weighs as much as its cells did.
        """
        return 2 * self.cells[:, 3].clamp(min=1).to(torch.float32).log()

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
        cells = self.cells.narrow(0, 0, self.num_tokens)  # AOTInductor (2.13) writes a slice without a start as None
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
        num_prefix = check_int("num_prefix", num_prefix, minimum=0)
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
        num_prefix = check_int("num_prefix", num_prefix, minimum=0)
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


def fake_layout(like: Tensor, rows: int, cols: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    batch_size = like.shape[0]
    capacity = batch_size * (num_prefix + rows * cols)
    return (like.new_empty(batch_size + 1, dtype=torch.int32), like.new_empty(capacity, 4, dtype=torch.int32))


_layout_from_sides = define(
    "layout_from_sides(Tensor sides, SymInt num_prefix) -> (Tensor, Tensor)",
    module="layout",
    fake=lambda sides, num_prefix: fake_layout(sides, sides.shape[1], sides.shape[2], num_prefix),
)
_layout_sides = define(
    "layout_sides(Tensor cu_seqlens, Tensor cells, SymInt rows, SymInt cols) -> Tensor",
    module="layout",
    fake=lambda cu_seqlens, cells, rows, cols: cells.new_empty(cu_seqlens.shape[0] - 1, rows, cols),
)
