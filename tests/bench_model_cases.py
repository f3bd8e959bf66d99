"""What the tests of `bench model` share: a case small enough for the CPU, and a stand-in for CUDA graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.compiling import CompileBudget
from bench.model import buckets, graphs, registry
from bench.model import case as cases
from bench.model.case import Case, draw_case, draw_inputs, draw_weights
from bench.model.layouts import SPREAD
from bench.model.schema import ModelRow
from bench.model.settings import Settings
from bench.schema import PASSED
from step_kernels.model import Trace
from step_kernels.model.graph import capture
from step_kernels.model.graph.cuda_graph import GraphPool
from step_kernels.model.vit import PRESETS

NANO = {"embed_dim": 48, "depth": 3, "num_heads": 3}
CPU = torch.device("cpu")
FAMILY = {one.name: one.family for one in registry.CONTENDERS}
GFLOPS = {"dense": 4000.0, "merged": 1250.0, "merged + exits": 1000.0, "policy + layout + merge": 20.0}


@contextlib.contextmanager
def nano_preset() -> Iterator[None]:
    """In this context there is a ViT "nano": dim 48, 3 blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", NANO)
        yield


def nano_settings(size: int = 64, **changes: Any) -> Settings:
    values = {"device": "cpu", "dtype": "float32", "models": ("nano",), "sizes": (size,), "batches": (2,), "classes": 5}
    return Settings(**{**values, "repeats": 2, **changes})


def nano_case(kind: str = SPREAD, batch: int = 2, **changes: Any) -> Case:
    """A case of ViT nano on random images."""
    settings = nano_settings(**changes)
    weights = draw_weights(settings, "nano")
    return draw_case(settings, weights, draw_inputs(settings, batch), kind, CompileBudget(0.0, CPU))


def contender(name: str) -> registry.Contender:
    return next(one for one in registry.CONTENDERS if one.name == name)


def model_row(contender: str, milliseconds: float | None, batch: int = 8, **changes: Any) -> ModelRow:
    """A made-up row of ViT-L at 1024 px on a GPU, as the clock would leave it."""
    family = FAMILY[contender]
    made = ModelRow(
        contender=contender,
        family=family,
        variant=None,
        model="large",
        batch=batch,
        layout=SPREAD,
        size=1024,
        device="cuda",
        dtype="bfloat16",
        tokens_mean=4096.0 if family == "dense" else 1638.4,
        tokens_min=4096 if family == "dense" else 700,
        tokens_max=4096 if family == "dense" else 2500,
        halted_share=0.4 if family == "merged + exits" else 0.0,
        gflops=GFLOPS[family],
        gate=PASSED,
        max_error=0.01,
        allowed_error=0.02,
        labels_differ=0,
        rounds=16,
        median_ms=milliseconds,
        p20_ms=milliseconds,
        p80_ms=milliseconds,
        compile_seconds=60.0 if contender == registry.DENSE else None,
    )
    return dataclasses.replace(made, **changes)


class EagerGraph:
    """The interface of `CudaGraph`; a replay runs the recorded function again and writes the recorded results.

    In a shared pool recording runs nothing, and a replay spoils what the pool's other graphs have left behind.
    """

    def __init__(self, device: torch.device, pool: GraphPool | None = None) -> None:
        self.seconds, self.memory_bytes = 0.5, 1000
        self._pooled: list[EagerGraph] = [] if pool is None else vars(pool).setdefault("recorded", [])
        self._shares = pool is not None

    def warm_up(self, run: Any, *, syncs: bool) -> Any:
        return run()

    def record(self, run: Any) -> Any:
        self._run, self._results = run, run()
        if self._shares:
            self._pooled.append(self)
            self.spoil()
        return self._results

    def wait(self) -> None:
        """Nothing runs behind the host's back."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def spoil(self) -> None:
        for left in tensors(self._results):
            left.fill_(float("nan") if left.is_floating_point() else 77)

    def replay(self) -> None:
        for other in self._pooled:
            other.spoil()
        for old, new in zip(tensors(self._results), tensors(self._run()), strict=True):
            old.copy_(new)


def tensors(results: Any) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    return capture.tensors_of(results) if isinstance(results, Trace) else [t for part in results for t in tensors(part)]


def fake_varlen_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int
) -> torch.Tensor:
    """What `varlen_attn` computes, image by image; other rows hold NaN, as uninitialised memory may."""
    out = torch.full_like(q, float("nan"))
    bounds = cu_q.tolist()
    assert torch.equal(cu_q, cu_k) and bounds[-1] <= q.shape[0]
    for start, end in itertools.pairwise(bounds):
        assert end - start <= min(max_q, max_k), "an image is longer than the launch grid"
        image = [x[None, start:end].transpose(1, 2) for x in (q, k, v)]
        out[start:end] = F.scaled_dot_product_attention(*image)[0].transpose(0, 1)
    return out


@contextlib.contextmanager
def eager_graphs() -> Iterator[None]:
    """In this context, "CUDA graphs" can be recorded on a CPU, and contenders that need a CUDA device run there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "CudaGraph", EagerGraph)
        patch.setattr(capture, "CudaGraph", EagerGraph)
        patch.setattr(capture, "refuse_unless_capturable", lambda images: None)
        patch.setattr(cases.Case, "static", True)
        patch.setattr(buckets, "find_varlen", lambda case: fake_varlen_attn)
        patch.setattr(registry, "CUDA", "math.pi")  # which every machine has
        yield
