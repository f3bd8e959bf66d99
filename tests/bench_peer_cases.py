"""What the tests of `bench peers` share: a case small enough for the CPU."""

from __future__ import annotations

from typing import Any

from bench_model_cases import nano_case

from bench.model.case import Case
from bench.model.layouts import QUOTA
from bench.model.registry import Contender
from bench.peers.registry import PEERS


def peer_case(kind: str = QUOTA, batch: int = 2, **changes: Any) -> Case:
    """A case of ViT nano on random images."""
    return nano_case(kind, batch, **changes)


def peer(name: str) -> Contender:
    return next(one for one in PEERS if one.name == name)
