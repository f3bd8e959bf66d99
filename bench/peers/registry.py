"""Who takes part in `python -m bench peers`, in the order of importance."""

from __future__ import annotations

import dataclasses

from ..model import registry as model
from ..model.case import DENSE, EXITS, MERGED, MERGED_EXITS
from ..model.registry import CUDA, Contender

OURS_EXITS_STATIC, OURS_EXITS_EXACT = "exits, static", "exits, exact"
DENSE_EAGER, DENSE_EAGER_SDPA = "dense, scores stored", "dense, SDPA"
CTS, CTS_SDPA = "CTS", "CTS, SDPA"
DTOP, DTOP_SDPA = "DToP", "DToP, SDPA"
CTS_DTOP, CTS_DTOP_SDPA = "CTS + DToP", "CTS + DToP, SDPA"
STEP, STEP_SDPA = "dCTS + DToP", "dCTS + DToP, SDPA"
TOME = "ToMe, r = 0"

FROM_MODEL = (model.DENSE, model.EXITS_STATIC, model.MERGED_STATIC, model.EXITS_EXACT, model.MERGED_EXACT)


def _peer(name: str, family: str, function: str) -> Contender:
    """A contender on every kind of layouts; builders are named relative to bench.model."""
    return Contender(name, family, f".peers.contenders.{function}", ours=False, everywhere=True)


PEERS = (
    *(dataclasses.replace(one, everywhere=True) for one in model.CONTENDERS if one.name in FROM_MODEL),
    Contender(OURS_EXITS_STATIC, EXITS, "ours.unmerged_exits_static", (CUDA,), everywhere=True),
    Contender(OURS_EXITS_EXACT, EXITS, "ours.unmerged_exits_exact", everywhere=True),
    _peer(STEP_SDPA, MERGED_EXITS, "step_sdpa"),
    _peer(CTS_DTOP_SDPA, MERGED_EXITS, "cts_dtop_sdpa"),
    _peer(CTS_SDPA, MERGED, "cts_sdpa"),
    _peer(DTOP_SDPA, EXITS, "dtop_sdpa"),
    _peer(DENSE_EAGER_SDPA, DENSE, "dense_sdpa"),
    Contender(TOME, DENSE, ".peers.tome.unmerged", ours=False, everywhere=True),
    _peer(STEP, MERGED_EXITS, "step"),
    _peer(CTS_DTOP, MERGED_EXITS, "cts_dtop"),
    _peer(CTS, MERGED, "cts"),
    _peer(DTOP, EXITS, "dtop"),
    _peer(DENSE_EAGER, DENSE, "dense"),
)
NAMES = tuple(one.name for one in PEERS)
