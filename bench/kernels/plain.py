"""What a good PyTorch user would write for the same jobs: layouts, merging, scattering, the output tail.

No loop over images, no op of step_kernels. Where good ways differ by device, there are several, and the fastest of them on the
machine at hand is the contender. Everything is computed from the layout's two tensors, at exactly the live size;
where that takes a host sync (a number of tokens per side, `nonzero`), the sync is part of the job, as it is for the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5  # sides 1, 2, 4, 8, 16


def resolve_layout(
    scores: Sequence[Tensor], sides: Sequence[int], threshold: float, grid: tuple[int, int], num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Fine to coarse, so that a coarse block paints over finer ones -> cu_seqlens, cells."""
    painted = torch.ones(scores[0].shape[0], *grid, dtype=torch.int32, device=scores[0].device)
    for score, side in sorted(zip(scores, sides, strict=True), key=lambda pair: pair[1]):
        taken = (score > threshold)[:, :, None, :, None]
        _blocks(painted[..., None], side)[..., 0].masked_fill_(taken, side)
    return from_sides(painted, num_prefix)


def from_sides(sides: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """A block stands where row and column are multiples of its side, a power of two -> cu_seqlens, cells."""
    batch, rows, cols = sides.shape
    row = torch.arange(rows, dtype=torch.int32, device=sides.device)[:, None]
    col = torch.arange(cols, dtype=torch.int32, device=sides.device)
    stands = (sides > 0) & (((row | col) & (sides - 1)) == 0)
    lengths = stands.sum((1, 2), dtype=torch.int32) + num_prefix
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    image, r, c = stands.nonzero(as_tuple=True)
    blocks = torch.stack([image, r, c, sides[image, r, c]], 1).to(torch.int32)
    if num_prefix == 0:
        return cu_seqlens, blocks
    cells = blocks.new_zeros(blocks.shape[0] + batch * num_prefix, 4)
    cells[torch.arange(blocks.shape[0], device=sides.device) + (image + 1) * num_prefix] = blocks
    images = torch.arange(batch, dtype=torch.int32, device=sides.device)
    cells[prefix_rows(cu_seqlens, num_prefix), 0] = images[:, None]
    return cu_seqlens, cells


def merge_patches(images: Tensor, cells: Tensor, patch: int) -> Tensor:
    """Mean over the pixels of the chosen blocks only, one side after the other; prefix rows zero."""
    out = images.new_zeros(cells.shape[0], images.shape[1] * patch**2)
    for side, rows in enumerate_sides(cells):
        image, r, c = cells[rows, :3].long().unbind(1)
        height, width = (extent // (patch * side) for extent in images.shape[2:])
        whole = images[:, :, : height * patch * side, : width * patch * side]
        split = whole.unflatten(3, (width, patch, side)).unflatten(2, (height, patch, side))
        blocks = split.permute(0, 2, 5, 1, 3, 4, 6, 7)[image, r // side, c // side]  # [n, C, p, side, p, side]
        out[rows] = blocks.mean((3, 5)).flatten(1)
    return out


def merge_patches_by_pooling(images: Tensor, cells: Tensor, patch: int) -> Tensor:
    """avg_pool2d of whole images at each side, then the chosen patches; prefix rows zero."""
    out = images.new_zeros(cells.shape[0], images.shape[1] * patch**2)
    for side, rows in enumerate_sides(cells):
        image, r, c = cells[rows, :3].long().unbind(1)
        pooled = images if side == 1 else F.avg_pool2d(images, side)
        height, width = (extent // patch for extent in pooled.shape[2:])
        whole = pooled[:, :, : height * patch, : width * patch]
        patches = whole.unflatten(3, (width, patch)).unflatten(2, (height, patch)).permute(0, 2, 4, 1, 3, 5)
        out[rows] = patches[image, r // side, c // side].flatten(1)
    return out


def embed_patches(*arguments: Any) -> Tensor:
    return _embed(merge_patches, *arguments)


def embed_patches_by_pooling(*arguments: Any) -> Tensor:
    return _embed(merge_patches_by_pooling, *arguments)


def _embed(
    merge: Callable[[Tensor, Tensor, int], Tensor],
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    prefix: Tensor,
    cu_seqlens: Tensor,
    cells: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Merge, one linear layer, and a table of the position embeddings pooled at every side, which all images share."""
    tokens = F.linear(merge(images, cells, weight.shape[2]), weight.flatten(1), bias)
    table, first, widths, offset = [positions], [0], [grid[1]], positions.shape[0]
    channels_last = positions.view(1, *grid, -1).permute(0, 3, 1, 2)
    for side in (1 << level for level in range(1, LEVELS)):
        if side <= min(grid):
            table.append(F.avg_pool2d(channels_last, side).permute(0, 2, 3, 1).flatten(0, 2))
            first.append(offset)
            widths.append(grid[1] // side)
            offset += table[-1].shape[0]
    _, row, col, side_of = cells.long().unbind(1)
    side_of = side_of.clamp(min=1)
    # Powers of two up to 16 have exact logarithms.
    level_of = side_of.float().log2().long()
    start, width = torch.tensor([first, widths], device=cells.device)[:, level_of]
    tokens = tokens + torch.cat(table).index_select(0, start + row // side_of * width + col // side_of)
    tokens[prefix_rows(cu_seqlens, prefix.shape[0])] = prefix
    return tokens


def merge_tokens(tokens: Tensor, prefix: Tensor, cu_seqlens: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """All cells of the tokens of one side in one index_select, then their mean."""
    flat = tokens.flatten(0, 1)
    out = tokens.new_empty(cells.shape[0], tokens.shape[2])
    for side, rows in enumerate_sides(cells):
        covered = cells_of_blocks(cells[rows], side, grid)
        out[rows] = flat.index_select(0, covered.flatten()).view(*covered.shape, -1).mean(1)
    out[prefix_rows(cu_seqlens, prefix.shape[0])] = prefix
    return out


def merge_tokens_in_one_copy(
    tokens: Tensor, prefix: Tensor, cu_seqlens: Tensor, cells: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The same, with one write of all rows at the end: a backward pass then copies the gradient once, not once per side."""
    flat = tokens.flatten(0, 1)
    order, means = [prefix_rows(cu_seqlens, prefix.shape[0]).flatten()], [prefix.repeat(tokens.shape[0], 1)]
    for side, rows in enumerate_sides(cells):
        covered = cells_of_blocks(cells[rows], side, grid)
        order.append(rows)
        means.append(flat.index_select(0, covered.flatten()).view(*covered.shape, -1).mean(1))
    return tokens.new_empty(cells.shape[0], tokens.shape[2]).index_copy(0, torch.cat(order), torch.cat(means))


def merge_tokens_by_pooling(
    tokens: Tensor, prefix: Tensor, cu_seqlens: Tensor, cells: Tensor, grid: tuple[int, int]
) -> Tensor:
    """avg_pool2d of all tokens at each side, then the chosen rows."""
    channels_last = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    out = tokens.new_empty(cells.shape[0], tokens.shape[2])
    for side, rows in enumerate_sides(cells):
        image, r, c = cells[rows, :3].long().unbind(1)
        pooled = (channels_last if side == 1 else F.avg_pool2d(channels_last, side)).permute(0, 2, 3, 1)
        row = (image * pooled.shape[1] + r // side) * pooled.shape[2] + c // side
        out[rows] = pooled.reshape(-1, pooled.shape[3]).index_select(0, row)
    out[prefix_rows(cu_seqlens, prefix.shape[0])] = prefix
    return out


def scatter_back(values: Tensor, cells: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
    """One index_select by a map from cells to rows. Needs layouts that tile their grids."""
    cell, row = covered_cells(cells, grid, batch * grid[0] * grid[1])
    row_of_cell = torch.empty_like(row)
    row_of_cell[cell] = row
    return values.index_select(0, row_of_cell).view(batch, *grid, -1).permute(0, 3, 1, 2)


def scatter_back_by_side(values: Tensor, cells: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
    """One index_copy of every token's cells, side by side.

    Its backward pass sums in fp32, where that of `scatter_back` adds row after row to a sum in the values' dtype.
    """
    places, copies = [], []
    for side, rows in enumerate_sides(cells):
        covered = cells_of_blocks(cells[rows], side, grid)
        places.append(covered.flatten())
        copies.append(values.index_select(0, rows)[:, None].expand(-1, side * side, -1).flatten(0, 1))
    flat = values.new_empty(batch * grid[0] * grid[1], values.shape[1])
    return flat.index_copy(0, torch.cat(places), torch.cat(copies)).view(batch, *grid, -1).permute(0, 3, 1, 2)


def scatter_into(canvas: Tensor, values: Tensor, where: Tensor, cells: Tensor) -> Tensor:
    """The covered cells of the selected tokens, in one index_put."""
    selected = where.nonzero().flatten()
    cell, position = covered_cells(cells[selected], (canvas.shape[2], canvas.shape[3]))
    flat = canvas.permute(0, 2, 3, 1).view(-1, canvas.shape[1])
    flat[cell] = values[selected[position]].to(canvas.dtype)
    return canvas


def scatter_into_by_mask(canvas: Tensor, values: Tensor, where: Tensor, cells: Tensor) -> Tensor:
    """Every cell is written, with its own value where no selected token covers it: no host sync. Needs a tiled grid."""
    batch, _, rows, cols = canvas.shape
    cell, row = covered_cells(cells, (rows, cols), batch * rows * cols)
    row_of_cell = torch.empty_like(row)
    row_of_cell[cell] = row
    flat = canvas.permute(0, 2, 3, 1).view(batch * rows * cols, -1)
    chosen = values.index_select(0, row_of_cell).to(canvas.dtype)
    flat.copy_(torch.where(where[row_of_cell][:, None], chosen, flat))
    return canvas


def upsample_argmax(canvas: Tensor, size: tuple[int, int]) -> Tensor:
    if canvas.shape[0] * canvas.shape[1] * size[0] * size[1] >= 2**31:  # too many for PyTorch's kernel: image by image
        return torch.cat([upsample_argmax(image, size) for image in canvas.split(1)])
    return F.interpolate(canvas, size, mode="bilinear", align_corners=False).argmax(1)


def gather_tokens(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.index_select(0, rows)


def prefix_rows(cu_seqlens: Tensor, num_prefix: int) -> Tensor:
    """int [B, num_prefix]"""
    return cu_seqlens[:-1, None] + torch.arange(num_prefix, device=cu_seqlens.device)


def enumerate_sides(cells: Tensor) -> list[tuple[int, Tensor]]:
    """(side, rows of the tokens that have it) for each side that occurs: one sort and one host sync for all."""
    side = cells[:, 3]
    known = torch.ones((), dtype=torch.int32, device=cells.device) << torch.arange(
        LEVELS, dtype=torch.int32, device=cells.device
    )
    counts = (side[:, None] == known).sum(0).tolist()
    order = side.argsort(stable=True)
    groups = order[cells.shape[0] - sum(counts) :].split(counts)  # prefix tokens, of side 0, come first
    return [(1 << level, rows) for level, rows in enumerate(groups) if rows.shape[0]]


def cells_of_blocks(cells: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """[n, side * side], flat index of every cell of blocks of one side."""
    image, row, col = cells[:, :3].long().unbind(1)
    step = torch.arange(side, device=cells.device)
    return ((image * grid[0] + row) * grid[1] + col)[:, None] + (step[:, None] * grid[1] + step).flatten()


def covered_cells(cells: Tensor, grid: tuple[int, int], number: int | None = None) -> tuple[Tensor, Tensor]:
    """Flat index of every covered cell of the batch, and the position in `cells` of the token that covers it.

    Args:
        cells: int [n, 4].
        grid: (rows, cols).
        number: how many cells are covered, where the caller knows it; without it the device is waited for.
    """
    image, row, col, side = cells.long().unbind(1)
    area = side * side
    position = torch.repeat_interleave(area, output_size=number)
    step = torch.arange(position.shape[0], device=cells.device) - (area.cumsum(0) - area)[position]
    width = side[position]
    corner = ((image * grid[0] + row) * grid[1] + col)[position]
    return corner + step // width * grid[1] + step % width, position


def _blocks(features: Tensor, side: int) -> Tensor:
    """[B, rows, cols, D] -> view [B, R, side, C, side, D]; cells past the last whole block are cropped."""
    rows, cols = features.shape[1] // side, features.shape[2] // side
    return features[:, : rows * side, : cols * side].unflatten(2, (cols, side)).unflatten(1, (rows, side))
