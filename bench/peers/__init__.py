"""The methods that STEP grew out of, beside this package: CTS shares 2x2 blocks, DToP lets confident tokens leave, STEP is both; and ToMe.

Written here from their published descriptions, no code of theirs, in eager PyTorch as their users run them: boolean masks and loops over
images. CTS (Lu et al., CVPR 2023) takes equally many blocks in every image; DToP is Tang et al., ICCV 2023, arXiv 2308.01045; STEP, arXiv
2509.14165, has larger blocks and other counts in every image. What can be done for the whole batch at once is; decisions are as for ours.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch.nn.functional as F

from ..engine import Case, Contender
from ..layouts import QUOTA, QUOTA_SHARE, SPREAD, draw_traces
from ..options import PATCH_SIZE, Options
from ..segmenters import DENSE, EXITS, MERGED, MERGED_EXITS, Segmenters, draw_inputs, draw_weights
from . import tome
from .eager import Attend, Peer, stored_scores

METHODS = {  # family whose decisions it repeats, whether images go through the model one by one
    "dCTS + DToP": (MERGED_EXITS, True),
    "CTS + DToP": (MERGED_EXITS, False),
    "CTS": (MERGED, False),
    "DToP": (EXITS, False),
    DENSE: (DENSE, False),
}
ATTENTIONS: dict[str, Attend] = {"SDPA": F.scaled_dot_product_attention, "scores stored": stored_scores}
BASELINE = f"{DENSE}, SDPA"


def method(segmenters: Segmenters, name: str, attend: Attend) -> Contender:
    family, per_image = METHODS[name]
    model = Peer(segmenters, family, attend, per_image=per_image)
    return segmenters.contender(family, model.labels, ours=False, note="PyTorch, eager")


def cases(options: Options) -> Iterator[Case]:
    """Layouts that CTS can take, then such that STEP can, for each model, size and batch."""
    for vit, size in itertools.product(options.vit, options.size):
        weights, grid = draw_weights(options, vit, size), (size // PATCH_SIZE, size // PATCH_SIZE)
        (block,) = weights.exits
        for batch, kind in itertools.product(options.batch, (QUOTA, SPREAD)):
            inputs = draw_inputs(options, batch, size)
            traces = draw_traces(kind, len(inputs), batch, grid, block=block, device=options.device)
            own = Segmenters(weights, inputs, traces)
            others = {
                f"{name}, {attention}": functools.partial(method, own, name, attend)
                for attention, attend in ATTENTIONS.items()
                for name in METHODS
            }
            ours = {
                f"{family}, {mode}": functools.partial(build, own, family)
                for mode, build in (("static", Segmenters.captured), ("exact", Segmenters.op_by_op))
                for family in (MERGED_EXITS, MERGED, EXITS)
            }
            tomes = {name: functools.partial(build, own) for name, build in tome.CONTENDERS.items()}
            contenders: dict[str, Callable[[], Contender]] = {BASELINE: others[BASELINE], **ours, **others, **tomes}
            shape = {"vit": vit, "size": size, "batch": batch, "layout": kind}
            yield Case("peers", shape, len(inputs), own.expected(DENSE), contenders, fixed=options.fixed)


def notes(options: Options) -> list[str]:
    return [
        "CTS, DToP and dCTS are written here from their papers, with this run's policy network and linear exits; DToP keeps no context tokens, so "
        "that all compute the same. Scores stored: matmul, softmax, matmul, as in the code that they are built on. Compiled, or as CUDA graphs "
        "where the counts allow it, they would be faster.",
        f"Quota layouts merge {QUOTA_SHARE:.0%} of the 2x2 blocks of every image, as CTS does at 768 px. The exits family merges nothing: the "
        "patches that a halting supertoken covers halt.",
        "ToMe merges by similarity inside every block and cannot repeat recorded decisions: it is held to the truth at r = 0 alone.",
    ]
