"""The ops on the patch grid: scatter-back, a canvas in place, and labels at image size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from step_kernels import scatter_back, scatter_into, selected_backend, upsample_argmax
from step_kernels.numerics import accumulator

from ..engine import Case, Contender, as_tuple
from ..gate import Expected, Outputs, regret, regret_of_rounding
from ..options import Options
from ..segmenters import at_full_size, plain_upsample_argmax
from .inputs import CLASSES, Example, Source, spread
from .op import LARGE, OURS, Op, asked, compiled, everything, nbytes


def cases(options: Options) -> Iterator[Case]:
    sources = spread(options)
    for op in (back(CLASSES), back(sources[0].dim), SCATTER_INTO):
        yield from op.cases(options, sources)
    yield tail(options, sources)
    if asked(options, LARGE):
        for op, times in (back(CLASSES), 10), (back(sources[0].dim), 4), (SCATTER_INTO, 24):
            yield from op.beyond_any_cache().cases(options, spread(options, times))


def back(channels: int) -> Op:
    return Op(
        "scatter_back",
        lambda s: s.example({"values"}, {"values": (s.live, channels)}).having({"gradient": s.canvas(channels)}),
        lambda e: lambda: scatter_back(e["values"], e.layout),
        {"PyTorch": back_by_cell},
        lambda e: (e["values"], e.layout.cells, e.layout.batch_size, e.layout.grid),
        shape=lambda e: {"channels": channels},
        view=as_tuple,
        gradients=("values",),
        bytes=everything,
    )


def selected(s: Source) -> Example:
    made = s.example({"values", "where"}, {"values": (s.live, CLASSES)})
    return made.having({"where": s.halted, "background": s.canvas(CLASSES)})


def written_bytes(e: Example) -> float:
    where, row = e["where"], nbytes(e["values"][:1])
    cells = int(e.layout.cells[where, 3].square().sum())
    return (int(where.sum()) + cells) * row + nbytes(where, e.layout.cu_seqlens, e.layout.cells)


def tail(options: Options, sources: Sequence[Source]) -> Case:
    """Judged by regret, one image of each input: a label that ties with the best one within rounding is no mistake."""
    canvases, pixels = [source.canvas(CLASSES) for source in sources], sources[0].pixels

    def exact(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return at_full_size(canvases[number][-1:].to(dtype), pixels)

    def view(labels: Tensor, number: int) -> Outputs:
        return (regret(labels[-1:], exact(number)),)

    def rounded(dtype: torch.dtype) -> Expected:
        """No regret but what scores explain that are upsampled in this dtype."""
        nothing = torch.zeros(1, *pixels, dtype=torch.float64, device=options.device)
        return Expected(lambda i: (nothing,), lambda i: (regret_of_rounding(exact(i, dtype), exact(i)),))

    precise, own = rounded(accumulator(options.dtype)), rounded(options.dtype)

    def ours() -> Contender:
        note = selected_backend("upsample_argmax", options.device)
        return Contender(lambda i: upsample_argmax(canvases[i], pixels), view, ours=True, note=note)

    def plain(run: Callable[..., Tensor]) -> Contender:
        return Contender(lambda i: run(canvases[i], pixels), view, expected=own)

    labels = len(canvases[0]) * pixels[0] * pixels[1]
    return Case(
        "upsample_argmax",
        {"images": len(canvases[0]), "classes": CLASSES, "pixels": pixels[0]},
        len(canvases),
        precise,
        {
            OURS: ours,
            "PyTorch": lambda: plain(plain_upsample_argmax),
            "PyTorch compiled": lambda: plain(compiled(options, plain_upsample_argmax)),
        },
        bytes=nbytes(canvases[0]) + labels,
        fixed=options.fixed,
    )


def back_by_cell(values: Tensor, cells: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
    """One index_select by a map from cells to rows, of layouts that tile their grids."""
    cell, row = covered_cells(cells, grid, batch * grid[0] * grid[1])
    rows = torch.empty_like(row)
    rows[cell] = row
    return values.index_select(0, rows).view(batch, *grid, -1).permute(0, 3, 1, 2)


def covered_cells(cells: Tensor, grid: tuple[int, int], number: int | None = None) -> tuple[Tensor, Tensor]:
    """Flat index of every covered cell of the batch, and the position in `cells` [n, 4] of the token that covers it.

    `number` is how many cells are covered, where the caller knows it; without it the device is waited for.
    """
    image, row, col, side = cells.long().unbind(1)
    area = side * side
    position = torch.repeat_interleave(area, output_size=number)
    step = torch.arange(position.shape[0], device=cells.device) - (area.cumsum(0) - area)[position]
    width = side[position]
    corner = ((image * grid[0] + row) * grid[1] + col)[position]
    return corner + step // width * grid[1] + step % width, position


def into_by_index(canvas: Tensor, values: Tensor, where: Tensor, cells: Tensor) -> Tensor:
    """The covered cells of the selected tokens, in one index_put."""
    selected = where.nonzero().flatten()
    cell, position = covered_cells(cells[selected], (canvas.shape[2], canvas.shape[3]))
    canvas.permute(0, 2, 3, 1).view(-1, canvas.shape[1])[cell] = values[selected[position]].to(canvas.dtype)
    return canvas


SCATTER_INTO = Op(
    "scatter_into",
    selected,
    lambda e: lambda: scatter_into(e["canvas"], e["values"], e.layout, where=e["where"]),
    {"PyTorch": into_by_index},
    lambda e: (*e.of("canvas", "values", "where"), e.layout.cells),
    shape=lambda e: {"channels": CLASSES},
    view=as_tuple,
    bytes=written_bytes,
)
