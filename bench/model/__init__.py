"""Whole models on random images and drawn layouts: dense, merged, merged + exits, and what else one could run in their place.

Every contender repeats the same recorded decisions, and every time includes the policy's work, where something is merged, and the output
tail. On spread layouts everybody takes part, on the other kinds the main contenders.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

from ..engine import Case, Contender
from ..layouts import KINDS, SPREAD, draw_traces
from ..options import PATCH_SIZE, Options
from ..segmenters import DENSE, MERGED, MERGED_EXITS, Segmenters, draw_inputs, draw_weights
from .dense import strongest
from .graphs import exact_size_graphs
from .parts import bucketed, by_grouped_mm, pytorch_parts
from .stages import exit_stage, front

MODES: dict[str, Callable[..., Contender]] = {
    "static": Segmenters.captured,
    "exact": Segmenters.op_by_op,
}
MAIN: dict[str, Callable[..., Contender]] = {
    f"{family}, {mode}": functools.partial(build, family=family)
    for mode, build in MODES.items()
    for family in (MERGED_EXITS, MERGED)
}
MORE: dict[str, Callable[..., Contender]] = {
    "dense, our kernels": functools.partial(Segmenters.captured, family=DENSE),
    "merged + exits, static, no graph": functools.partial(Segmenters.op_by_op, family=MERGED_EXITS, static=True),
    "merged + exits, exact-size graph": exact_size_graphs,
    "merged + exits, PyTorch's parts": pytorch_parts,
    "merged + exits, PyTorch's parts, bucketed graphs": bucketed,
    "merged + exits, grouped_mm": by_grouped_mm,
}


def cases(options: Options) -> Iterator[Case]:
    """The most important first: all kinds of layouts at a model's first size and batch, spread ones at the others."""
    shapes = list(itertools.product(options.size, options.batch))
    for vit, (size, batch) in itertools.product(options.vit, shapes):
        weights, inputs = draw_weights(options, vit, size), draw_inputs(options, batch, size)
        ((block, _),), grid = weights.exits.items(), (size // PATCH_SIZE, size // PATCH_SIZE)
        unmerged = Segmenters(weights, inputs, ())
        dense = functools.cache(functools.partial(strongest, unmerged, options.compile))  # once for all layouts
        for kind in KINDS if (size, batch) == shapes[0] else (SPREAD,):
            traces = draw_traces(kind, len(inputs), batch, grid, block=block, device=options.device)
            own, shape = Segmenters(weights, inputs, traces), {"vit": vit, "size": size, "batch": batch, "layout": kind}
            builders = MAIN | MORE if kind == SPREAD else MAIN
            contenders: dict[str, Callable[[], Contender]] = {DENSE: dense}
            contenders |= {name: functools.partial(build, own) for name, build in builders.items()}
            yield Case("segmenter", shape, len(inputs), unmerged.expected(DENSE), contenders, fixed=options.fixed)
            for part in (exit_stage, front) if kind == SPREAD else ():
                yield dataclasses.replace(part(own, dense, shape), fixed=options.fixed)
