"""Whole models on random images and drawn layouts: dense, merged, merged + exits, and what else one could run in their place.

Every contender repeats the same recorded decisions, and every time includes the output tail and, where something is merged, the policy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

from ..engine import Case, Contender
from ..layouts import KINDS, SPREAD, draw_traces
from ..options import PATCH_SIZE, Options
from ..segmenters import DENSE, MERGED, MERGED_EXITS, Segmenters, draw_inputs, draw_weights
from .dense import strongest
from .graphs import exact_size_graphs
from .parts import bucketed, by_grouped_mm, op_by_op

MAIN: dict[str, Callable[[Segmenters], Contender]] = {
    "merged + exits, static": lambda own: own.captured(MERGED_EXITS),
    "merged, static": lambda own: own.captured(MERGED),
    "merged + exits, exact": lambda own: own.op_by_op(MERGED_EXITS),
    "merged, exact": lambda own: own.op_by_op(MERGED),
}
MORE: dict[str, Callable[[Segmenters], Contender]] = {
    "dense, our kernels": lambda own: own.captured(DENSE),
    "merged + exits, static, no graph": lambda own: own.op_by_op(MERGED_EXITS, static=True),
    "merged + exits, exact-size graph": exact_size_graphs,
    "merged + exits, PyTorch's parts": op_by_op,
    "merged + exits, PyTorch's parts, bucketed graphs": bucketed,
    "merged + exits, grouped_mm": by_grouped_mm,
}


def cases(options: Options) -> Iterator[Case]:
    """The most important first: all kinds of layouts at a model's first size and batch, spread ones at the others."""
    shapes = list(itertools.product(options.size, options.batch))
    for vit, (size, batch) in itertools.product(options.vit, shapes):
        weights, inputs = draw_weights(options, vit, size), draw_inputs(options, batch, size)
        (block,), grid = weights.exits, (size // PATCH_SIZE, size // PATCH_SIZE)
        unmerged = Segmenters(weights, inputs, ())
        dense = functools.cache(functools.partial(strongest, unmerged, options.compile))  # once for all layouts
        for kind in KINDS if (size, batch) == shapes[0] else (SPREAD,):
            traces = draw_traces(kind, len(inputs), batch, grid, block=block, device=options.device)
            own, shape = Segmenters(weights, inputs, traces), {"vit": vit, "size": size, "batch": batch, "layout": kind}
            contenders: dict[str, Callable[[], Contender]] = {DENSE: dense}
            for name, build in (MAIN | MORE if kind == SPREAD else MAIN).items():
                contenders[name] = functools.partial(build, own)
            yield Case("segmenter", shape, len(inputs), unmerged.expected(DENSE), contenders, fixed=options.fixed)
