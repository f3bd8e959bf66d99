"""Whole models on random images and drawn layouts: dense, merged, merged + exits, and what else one could run in their place.

Every contender repeats the same recorded decisions, and every time includes the policy's work, where something is merged, and the output
tail. On spread layouts everybody takes part, on the other kinds the main contenders.
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
from .parts import bucketed, by_grouped_mm, pytorch_parts
from .stages import exit_stage, front

Builders = dict[str, Callable[[], Contender]]


def cases(options: Options) -> Iterator[Case]:
    """The most important first: all kinds of layouts at a model's first size and batch, spread ones at the others."""
    for vit in options.vit:
        shapes = list(itertools.product(options.size, options.batch))
        for size, batch in shapes:
            weights = draw_weights(options, vit, size)
            block, grid = next(iter(weights.exits)), (size // PATCH_SIZE, size // PATCH_SIZE)
            segmenters = Segmenters(weights, draw_inputs(options, batch, size), ())
            dense = functools.cache(
                functools.partial(strongest, segmenters, options.compile)
            )  # the same on all layouts
            for kind in KINDS if (size, batch) == shapes[0] else (SPREAD,):
                traces = draw_traces(kind, len(segmenters.inputs), batch, grid, block=block, device=options.device)
                own = segmenters.at(traces)
                shape = {"vit": vit, "size": size, "batch": batch, "layout": kind}
                contenders: Builders = {
                    DENSE: dense,
                    **main_contenders(own),
                    **(more_contenders(own) if kind == SPREAD else {}),
                }
                expected = own.expected(DENSE)
                yield Case("segmenter", shape, len(own.inputs), expected, contenders, fixed=options.fixed)
                for part in (exit_stage, front) if kind == SPREAD else ():
                    yield part(own, dense, shape, options.fixed)


def main_contenders(segmenters: Segmenters) -> Builders:
    modes: dict[str, Callable[..., Contender]] = {"static": Segmenters.captured, "exact": exact}
    return {
        f"{family}, {mode}": functools.partial(build, segmenters, family)
        for mode, build in modes.items()
        for family in (MERGED_EXITS, MERGED)
    }


def more_contenders(segmenters: Segmenters) -> Builders:
    builders: dict[str, Callable[..., Contender]] = {
        "dense, our kernels": functools.partial(Segmenters.captured, family=DENSE),
        "merged + exits, static, no graph": functools.partial(exact, family=MERGED_EXITS, static=True),
        "merged + exits, exact-size graph": exact_size_graphs,
        "merged + exits, PyTorch's parts": pytorch_parts,
        "merged + exits, PyTorch's parts, bucketed graphs": bucketed,
        "merged + exits, grouped_mm": by_grouped_mm,
    }
    return {name: functools.partial(build, segmenters) for name, build in builders.items()}


def exact(segmenters: Segmenters, family: str, *, static: bool = False) -> Contender:
    """Launched op by op; static: nothing is cut to the live size."""
    return segmenters.contender(family, segmenters.eager(family, static=static), ours=True, note="op by op")
