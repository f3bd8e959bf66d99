"""Layouts to test with: a plain-Python twin of SupertokenLayout, a table of awkward ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from step_kernels import SupertokenLayout, resolve_layout, use_backend


class Token(NamedTuple):
    """One live row of a packed tensor."""

    image: int
    row: int
    column: int
    side: int  # 0 for a prefix token


Block = tuple[int, int, int]


@dataclass(frozen=True)
class PlainLayout:
    """A layout as nested tuples: for each image its (row, column, side) blocks, in order."""

    images: tuple[tuple[Block, ...], ...]
    grid: tuple[int, int]
    num_prefix: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.images)

    def tokens(self) -> list[Token]:
        """Every live row in packed order."""
        rows = []
        for image, blocks in enumerate(self.images):
            rows += [Token(image, 0, 0, 0)] * self.num_prefix
            rows += [Token(image, *block) for block in blocks]
        return rows

    def cu_seqlens(self) -> list[int]:
        """Running sum of the images' lengths, prefix tokens included."""
        total = [0]
        for blocks in self.images:
            total.append(total[-1] + self.num_prefix + len(blocks))
        return total

    def without(self, dropped: list[bool]) -> PlainLayout:
        """The layout whose rows marked in ``dropped`` are gone."""
        kept: list[list[Block]] = [[] for _ in self.images]
        for token, gone in zip(self.tokens(), dropped, strict=True):
            if token.side and not gone:
                kept[token.image].append((token.row, token.column, token.side))
        return PlainLayout(tuple(tuple(blocks) for blocks in kept), self.grid, self.num_prefix)


def build(layout: PlainLayout, spare: int | None = 0) -> SupertokenLayout:
    """The package's layout with ``spare`` unused rows; None gives the capacity of an untrimmed merge."""
    cells = [list(token) for token in layout.tokens()]
    if spare is None:
        spare = len(layout.images) * (layout.num_prefix + layout.grid[0] * layout.grid[1]) - len(cells)
    return SupertokenLayout(
        cu_seqlens=torch.tensor(layout.cu_seqlens(), dtype=torch.int32),
        cells=torch.tensor(cells + [[0, 0, 0, 0]] * spare, dtype=torch.int32).reshape(-1, 4),
        grid=layout.grid,
        num_prefix=layout.num_prefix,
        trimmed=spare == 0,
    )


def read(layout: SupertokenLayout) -> PlainLayout:
    """Back to plain Python; every promise of the data structure is checked on the way."""
    starts = layout.cu_seqlens.tolist()
    assert layout.cu_seqlens.dtype == layout.cells.dtype == torch.int32
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] <= len(layout.cells)
    assert not layout.trimmed or starts[-1] == len(layout.cells)
    assert not layout.cells[starts[-1] :].any(), "rows past the live count are not zero"
    images = []
    for image in range(len(starts) - 1):
        rows = [Token(*row) for row in layout.cells[starts[image] : starts[image + 1]].tolist()]
        assert rows[: layout.num_prefix] == [Token(image, 0, 0, 0)] * layout.num_prefix
        blocks = tuple((token.row, token.column, token.side) for token in rows[layout.num_prefix :])
        assert all(token.image == image for token in rows)
        assert list(blocks) == sorted(blocks), "tokens are not in raster order of their top-left cells"
        images.append(blocks)
    return PlainLayout(tuple(images), tuple(layout.grid), layout.num_prefix)


def same_layout(ours: SupertokenLayout, expected: SupertokenLayout) -> None:
    """Bit for bit, tail included, on whatever devices."""
    assert torch.equal(ours.cu_seqlens.cpu(), expected.cu_seqlens.cpu())
    assert torch.equal(ours.cells.cpu(), expected.cells.cpu())
    assert ours.num_prefix == expected.num_prefix and ours.trimmed == expected.trimmed


def row_of_tokens(*lengths: int, capacity: int) -> SupertokenLayout:
    """Untrimmed: images of so many side-1 tokens each, in a grid of one row."""
    plain = PlainLayout(tuple(tuple((0, column, 1) for column in range(n)) for n in lengths), (1, max(1, *lengths)))
    return replace(build(plain, capacity - sum(lengths)), trimmed=False)


def mixed(
    batch: int,
    grid: tuple[int, int],
    num_prefix: int = 1,
    threshold: float = 0.5,
    sides: tuple[int, ...] = (2, 4, 8, 16),
) -> SupertokenLayout:
    """Random blocks, by the reference on the CPU; untrimmed."""
    scores = [torch.randn(batch, grid[0] // side, grid[1] // side) for side in sides]
    with use_backend("reference"):
        return resolve_layout(scores, sides=sides, thresholds=threshold, grid=grid, num_prefix=num_prefix)


def tile(grid: tuple[int, int], accept: Callable[[int, int, int], bool], max_side: int = 64) -> tuple[Block, ...]:
    """Aligned power-of-two blocks, coarse to fine, wherever ``accept(row, column, side)`` says so; side 1 elsewhere."""
    rows, columns = grid
    taken: set[tuple[int, int]] = set()
    blocks: list[Block] = []
    side = max_side
    while side >= 1:
        for row in range(0, rows - side + 1, side):
            for column in range(0, columns - side + 1, side):
                if (row, column) in taken or (side > 1 and not accept(row, column, side)):
                    continue
                blocks.append((row, column, side))
                taken |= {(i, j) for i in range(row, row + side) for j in range(column, column + side)}
        side //= 2
    return tuple(sorted(blocks))


def _coarse(grid: tuple[int, int], max_side: int) -> tuple[Block, ...]:
    return tile(grid, lambda row, column, side: True, max_side)


def _fine(grid: tuple[int, int]) -> tuple[Block, ...]:
    return tile(grid, lambda row, column, side: False)


def _mixed(grid: tuple[int, int], max_side: int = 8) -> tuple[Block, ...]:
    return tile(grid, lambda row, column, side: (row + 2 * column + side) % 3 == 0, max_side)


AWKWARD: dict[str, PlainLayout] = {
    "one_cell": PlainLayout((((0, 0, 1),),), (1, 1)),
    "one_cell_prefix": PlainLayout((((0, 0, 1),), ((0, 0, 1),)), (1, 1), 1),
    "row_1x7": PlainLayout((_fine((1, 7)), _fine((1, 7))[2:4]), (1, 7), 1),
    "ragged_3x5": PlainLayout((_coarse((3, 5), 2), _fine((3, 5)), _mixed((3, 5), 2)), (3, 5)),
    "prefix_5": PlainLayout((_coarse((4, 6), 4), _mixed((4, 6), 4)), (4, 6), 5),
    "tall_8x3": PlainLayout((_coarse((8, 3), 2), _fine((8, 3))), (8, 3), 1),
    "single_token": PlainLayout((((0, 0, 8),),), (8, 8)),
    "all_sides_16": PlainLayout((_mixed((16, 16), 16), _coarse((16, 16), 16)), (16, 16), 1),
    "odd_17x33": PlainLayout((_mixed((17, 33), 16),), (17, 33), 1),
    "image_emptied": PlainLayout((_mixed((4, 4), 4), (), _coarse((4, 4), 2)), (4, 4)),
    "first_and_last_emptied": PlainLayout(((), _mixed((4, 4), 4), ()), (4, 4), 1),
    "holes": PlainLayout((_mixed((6, 7), 2)[1::2], _fine((6, 7))[5:9]), (6, 7), 1),
    "all_halted": PlainLayout(((), ()), (4, 4)),
    "all_halted_prefix": PlainLayout(((), ()), (4, 4), 5),
    "empty_batch": PlainLayout((), (4, 4), 1),
}
SPARE_ROWS = (0, 3, None)
