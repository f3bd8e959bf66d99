"""Who takes part: every contender by name, what it repeats, what it needs, and how it is built.

A further one is a `Contender` in `CONTENDERS`, in the order of importance: when the budget runs out, the last ones go without.
Builders are named, not imported, so that the command line can list contenders before any of them is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import Trace

if TYPE_CHECKING:
    from .case import Case

Decide = Callable[[Tensor, SupertokenLayout, float], Trace]

CUDA = "a CUDA device"
DENSE, DENSE_OURS = "dense", "dense, our kernels"
MERGED_STATIC, EXITS_STATIC = "merged, static", "merged + exits, static"
MERGED_EXACT, EXITS_EXACT = "merged, exact", "merged + exits, exact"
EXITS_STATIC_EAGER = "merged + exits, static, no graph"
EXACT_GRAPH, GROUPED = "merged + exits, exact-size graph", "merged + exits, grouped_mm"
UNSEARCHED = "without max-autotune"  # in the variant of a dense row that the compiler had no time to search for
PARTS, FRONT = "merged + exits, PyTorch's parts", "policy + layout + merge"
BUCKETS = f"{PARTS}, bucketed graphs"


@dataclass(frozen=True)
class Built:
    """A contender ready to run on the inputs of a case.

    Attributes:
        labels: number of an input -> labels [batch, size, size], or what else the part computes; timed.
        scores: number of an input -> what the gate compares: class scores [batch, classes, rows, cols], or packed rows.
        variant: what exactly runs, where there is a choice.
        compile_seconds: warm-up, compilation and capture; None where there is nothing of the kind.
        held_bytes: device memory held between calls, such as a graph's.
        note: what a reader should know.
        decide: images, their layout, the exits' threshold -> the decisions of a free run; None for a contender that decides nothing, or
            not by code of ours.
    """

    labels: Callable[[int], Tensor]
    scores: Callable[[int], Tensor]
    variant: str | None = None
    compile_seconds: float | None = None
    held_bytes: int = 0
    note: str | None = None
    decide: Decide | None = None


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: of the row.
        family: whose decisions it repeats: "dense", "merged", "merged + exits", or "policy + layout + merge".
        builder: "module.function" of bench.model: `Case` -> `Built`.
        needs: `CUDA`, and full names of what has to be importable.
        ours: an op of step_kernels computes its scores, so the gate allows it less (see `bench.model.gate`).
        everywhere: takes part on every kind of layouts, not on the spread ones alone.
    """

    name: str
    family: str
    builder: str
    needs: tuple[str, ...] = ()
    ours: bool = True
    everywhere: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        lacking = [need for need in self.needs if not _there(need, device)]
        return f"needs {' and '.join(lacking)}" if lacking else None

    def build(self, case: Case) -> Built:
        """Loads and calls the builder."""
        module, _, function = self.builder.rpartition(".")
        built: Built = getattr(importlib.import_module(f".{module}", __package__), function)(case)
        return built


def _there(need: str, device: torch.device) -> bool:
    if need == CUDA:
        return device.type == "cuda"
    module, _, attribute = need.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


CONTENDERS = (
    Contender(DENSE, "dense", "dense.dense", ours=False, everywhere=True),
    Contender(EXITS_STATIC, "merged + exits", "ours.exits_static", (CUDA,), everywhere=True),
    Contender(MERGED_STATIC, "merged", "ours.merged_static", (CUDA,), everywhere=True),
    Contender(EXACT_GRAPH, "merged + exits", "ours.exact_size_graph", (CUDA,)),
    Contender(DENSE_OURS, "dense", "ours.dense_static", (CUDA,)),
    Contender(FRONT, "policy + layout + merge", "ours.front"),
    Contender(EXITS_EXACT, "merged + exits", "ours.exits_exact", everywhere=True),
    Contender(MERGED_EXACT, "merged", "ours.merged_exact", everywhere=True),
    Contender(BUCKETS, "merged + exits", "buckets.bucketed_parts", (CUDA,), ours=False),
    Contender(PARTS, "merged + exits", "parts.pytorch_parts", ours=False),
    Contender(GROUPED, "merged + exits", "grouped.grouped_static", (CUDA,), ours=False),
    Contender(EXITS_STATIC_EAGER, "merged + exits", "ours.exits_static_eager"),
)
NAMES = tuple(contender.name for contender in CONTENDERS)
