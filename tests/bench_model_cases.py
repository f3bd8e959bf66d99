"""What the tests of `bench model` share: a case small enough for the CPU, and a stand-in for CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.compiling import CompileBudget
from bench.model import case as cases
from bench.model import graphs, registry
from bench.model.case import Case, draw_case, draw_inputs, draw_weights
from bench.model.layouts import SPREAD
from bench.model.settings import Settings
from step_kernels.model import Trace, capture
from step_kernels.model.vit import PRESETS

NANO = {"embed_dim": 48, "depth": 3, "num_heads": 3}
CPU = torch.device("cpu")


@contextlib.contextmanager
def nano_preset() -> Iterator[None]:
    """In this context there is a ViT "nano": dim 48, 3 blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", NANO)
        yield


def nano_settings(**changes: Any) -> Settings:
    values = {"device": "cpu", "dtype": "float32", "models": ("nano",), "size": 64, "batches": (2,), "classes": 5}
    return Settings(**{**values, "repeats": 2, **changes})


def nano_case(kind: str = SPREAD, batch: int = 2, **changes: Any) -> Case:
    """A case of ViT nano on random images."""
    settings = nano_settings(**changes)
    weights = draw_weights(settings, "nano")
    return draw_case(settings, weights, draw_inputs(settings, batch), kind, CompileBudget(0.0, CPU))


def contender(name: str) -> registry.Contender:
    return next(one for one in registry.CONTENDERS if one.name == name)


class EagerGraph:
    """The interface of `CudaGraph`; a replay runs the recorded function again and writes the recorded results."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self.memory_bytes = 0.5, 1000

    def warm_up(self, run: Any, *, syncs: bool) -> Any:
        return run()

    def record(self, run: Any) -> Any:
        self._run, self._results = run, run()
        return self._results

    def wait(self) -> None:
        """Nothing runs behind the host's back."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def replay(self) -> None:
        for old, new in zip(tensors(self._results), tensors(self._run()), strict=True):
            old.copy_(new)


def tensors(results: Any) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    return capture.tensors_of(results) if isinstance(results, Trace) else [t for part in results for t in tensors(part)]


@contextlib.contextmanager
def eager_graphs() -> Iterator[None]:
    """In this context, "CUDA graphs" can be recorded on a CPU, and contenders that need a CUDA device run there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "CudaGraph", EagerGraph)
        patch.setattr(capture, "CudaGraph", EagerGraph)
        patch.setattr(capture, "refuse_unless_capturable", lambda images: None)
        patch.setattr(cases.Case, "static", True)
        patch.setattr(registry, "CUDA", "math.pi")  # which every machine has
        yield
