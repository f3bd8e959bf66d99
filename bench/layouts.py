"""Recorded decisions by kind: which cells are merged, and who halts at the exit.

"spread": the mean image keeps 1 / 2.5 of its tokens, and images differ (CV 0.3). "fixed": every image keeps that many. "realistic": what
the variance policy chooses on photographs, the mean again at 1 / 2.5. In these, 40 % of all tokens halt, drawn at random. Adversarial, on
spread layouts: nobody, everybody, everybody of one image. "quota" is what CTS can take: equally many 2x2 blocks in every image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from step_kernels import SupertokenLayout, resolve_layout, use_backend
from step_kernels.model import Stage, Trace, VariancePolicy

from .images import squares

SPREAD, REALISTIC, FIXED = "spread", "realistic", "fixed"
NONE_HALTED, ALL_HALTED, EMPTY_IMAGE = "none-halted", "all-halted", "empty-image"
KINDS = (SPREAD, REALISTIC, FIXED, NONE_HALTED, ALL_HALTED, EMPTY_IMAGE)  # the most important one first
QUOTA = "quota"
QUOTA_SHARE = 336 / 576  # of the 2x2 blocks: CTS's own at 768 px, where 2304 patches become 1296 tokens
REDUCTION = 2.5
VARIATION = 0.3  # standard deviation of the images' tokens over their mean
HALT_SHARE = 0.4
NUM_PREFIX = 1  # the class token
SIDES = (2, 4, 8, 16)
THRESHOLD = 0.0
FEWEST, MOST = 0.02, 1.0  # share of an image's cells that may remain as tokens, where the draw would leave that range
ROUGHNESS = 0.55  # amplitude of each octave of the busy map relative to the next coarser one: all sides occur
BISECTIONS = 30
PHOTOGRAPH = 256  # pixels of a square: photographs have several of them
SEED = 0
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [T, H, D]


@dataclass(frozen=True)
class Drawn:
    """One batch: a policy's scores, one map for each of `sides`, and the trimmed layout that they resolve to at `THRESHOLD`."""

    scores: tuple[Tensor, ...]
    sides: tuple[int, ...]
    layout: SupertokenLayout


@torch.no_grad()
def draw_traces(
    kind: str, count: int, batch: int, grid: tuple[int, int], *, block: int, device: torch.device | str = "cpu"
) -> tuple[Trace, ...]:
    """`count` batches of decisions with one exit after `block`, trimmed, on `device`; always the same."""
    generator = torch.Generator().manual_seed(SEED)
    if kind == QUOTA:
        layouts = [quota_layout(batch, grid, generator) for _ in range(count)]
    elif kind == REALISTIC:
        layouts = realistic_layouts(count, batch, grid)
    else:
        drawn = draw_layouts(count, batch, grid, variation=0.0 if kind == FIXED else VARIATION)
        layouts = [one.layout for one in drawn]
    return tuple(recorded(layout.to(device), block, who_halts(kind, layout, generator)) for layout in layouts)


def recorded(layout: SupertokenLayout, block: int, halted: Tensor) -> Trace:
    """The decisions of a trimmed layout whose tokens in `halted`, bool [tokens], leave after `block`."""
    halted = halted.to(layout.device)
    before = F.pad((~halted).cumsum(0, dtype=torch.int32), (1, 0))
    cu_seqlens, cells = before[layout.cu_seqlens.long()], layout.cells[~halted]
    survivors = SupertokenLayout(cu_seqlens, cells, layout.grid, layout.num_prefix, trimmed=True)
    return Trace(layout, (Stage(block, halted, survivors),))


def who_halts(kind: str, layout: SupertokenLayout, generator: torch.Generator) -> Tensor:
    """bool [tokens] of a trimmed layout on the generator's device; a prefix token never does."""
    is_block = layout.cells[:, 3] > 0
    share = {ALL_HALTED: 1.0, NONE_HALTED: 0.0}.get(kind, HALT_SHARE)
    order = is_block.nonzero()[torch.randperm(int(is_block.sum()), generator=generator)]
    halted = torch.zeros_like(is_block)
    halted[order[: round(share * len(order))]] = True
    if kind == EMPTY_IMAGE:
        halted |= is_block & (layout.cells[:, 0] == layout.batch_size // 2)
    return halted


def gone_at(trace: Trace, stage: Stage) -> Tensor:
    """bool [B, rows, cols]: cells whose token halts at this exit."""
    return (trace.layout_of(stage.block).sides() > 0) & (stage.layout.sides() == 0)


def without_merging(trace: Trace) -> Trace:
    """The decisions on every patch for itself: it halts where the token that covers it halts."""
    (stage,), layout, prefix = trace.stages, trace.layout, trace.layout.num_prefix
    uniform = SupertokenLayout.uniform(layout.batch_size, layout.grid, num_prefix=prefix, device=layout.device)
    return recorded(uniform, stage.block, F.pad(gone_at(trace, stage).flatten(1), (prefix, 0)).flatten())


def draw_layouts(
    count: int, batch: int, grid: tuple[int, int], *, dtype: torch.dtype = torch.float32, variation: float = VARIATION
) -> list[Drawn]:
    """`count` batches on the CPU, each with the mean of `REDUCTION` and this variation (batches of one image: all of them together).

    An image is a smooth random map of how busy each cell is. A block may merge while its busiest cell is calmer than the image's own
    limit, and bisection finds the limit that leaves the number of tokens drawn for the image. Scores are in `dtype`.
    """
    generator = torch.Generator().manual_seed(SEED)
    sides = tuple(side for side in SIDES if side <= min(grid))
    normal = torch.randn((1, count) if batch == 1 else (count, batch), generator=generator, dtype=torch.float64)
    shares = (1 + variation * F.layer_norm(normal, normal.shape[1:], eps=1e-12)) / REDUCTION
    wanted = shares.clamp(FEWEST, MOST).flatten() * grid[0] * grid[1]
    busy, size = torch.zeros(count * batch, 1, *grid), 2
    while size <= max(grid):  # noise of every wavelength, the longer the stronger
        noise = torch.randn(count * batch, 1, size, size, generator=generator)
        busy = busy / ROUGHNESS + F.interpolate(noise, grid, mode="bilinear", align_corners=False)
        size *= 2
    busiest = [F.max_pool2d(busy, side)[:, 0] for side in sides]

    def scores(limit: Tensor) -> list[Tensor]:
        # Rounding to a narrow dtype keeps a difference's sign, so it changes no decision at threshold 0.
        return [(limit[:, None, None] - block).to(dtype) for block in busiest]

    low, high = busy.amin((1, 2, 3)) - 1, busy.amax((1, 2, 3)) + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = resolved(scores(middle), sides, grid).lengths() - NUM_PREFIX > wanted
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    batches = zip(*(score.split(batch) for score in scores(high)), strict=True)
    return [Drawn(own, sides, resolved(own, sides, grid).trim()) for own in batches]


def resolved(scores: Sequence[Tensor], sides: Sequence[int], grid: tuple[int, int]) -> SupertokenLayout:
    with use_backend("reference"):
        return resolve_layout(list(scores), sides=sides, thresholds=THRESHOLD, grid=grid, num_prefix=NUM_PREFIX)


def quota_layout(batch: int, grid: tuple[int, int], generator: torch.Generator) -> SupertokenLayout:
    """2x2 blocks at random places."""
    rows, cols = grid[0] // 2, grid[1] // 2
    order = torch.rand(batch, rows * cols, generator=generator).argsort(1)
    shared = (order < round(QUOTA_SHARE * rows * cols)).view(batch, rows, cols)
    return resolved([shared.float()], (2,), grid).trim()


def realistic_layouts(count: int, batch: int, grid: tuple[int, int]) -> list[SupertokenLayout]:
    """Trimmed, on the CPU, of different pictures. A layout says which cells are merged, not how many pixels they have: patches are small."""
    patch = min(16, max(4, PHOTOGRAPH // max(grid)))
    pictures = squares(count * batch, max(grid) * patch).tensor()[:, :, : grid[0] * patch, : grid[1] * patch]
    with use_backend("reference"):
        policy = VariancePolicy.calibrate(pictures, reduction=REDUCTION, patch_size=patch)
        return [policy(own, patch_size=patch, num_prefix=NUM_PREFIX).trim() for own in pictures.split(batch)]


class Padding:
    """A packed batch as [B, longest] rows: which of them are tokens, and where each packed row stands."""

    def __init__(self, lengths: Tensor) -> None:
        self.shape = lengths.shape[0], max(1, int(lengths.max()))
        self.mask = torch.arange(self.shape[1], device=lengths.device) < lengths[:, None]
        self.rows = self.mask.flatten().nonzero().flatten()

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, longest, D], zeros between the images."""
        room = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return room.index_copy(0, self.rows, packed).unflatten(0, self.shape).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q is [B, H, any, D] already."""
        return F.scaled_dot_product_attention(q, self.pad(k), self.pad(v), attn_mask=self.mask[:, None, None])

    def self_attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Pad, SDPA with a key mask, and back."""
        return self.attend(self.pad(q), k, v).transpose(1, 2).flatten(0, 1).index_select(0, self.rows)


def has_varlen(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def varlen(cu_seqlens: Tensor, longest: int) -> Attend:
    return lambda q, k, v: cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest))
