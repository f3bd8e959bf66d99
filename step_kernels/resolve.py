"""From a policy's scores to a layout: which blocks are taken, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .checks import check_capacity, check_device, check_grid, check_int, check_sides, check_tensor, check_thresholds
from .layout import SupertokenLayout, fake_layout
from .library import define


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
    num_prefix = check_int("num_prefix", num_prefix, minimum=0)
    if isinstance(scores, Tensor) or not isinstance(scores, (list, tuple)) or not scores:
        raise TypeError(f"scores: expected a non-empty list of tensors, one per side, got {checks.describe(scores)}")
    sides = check_sides("sides", sides)
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


_resolve_layout = define(
    "resolve_layout(Tensor[] scores, int[] sides, float[] thresholds, Tensor[] threshold_tensors, SymInt rows, SymInt cols, "
    "SymInt num_prefix) -> (Tensor, Tensor)",
    module="layout",
    fake=lambda scores, sides, numbers, tensors, rows, cols, num_prefix: fake_layout(scores[0], rows, cols, num_prefix),
)
