"""torch.compile(fullgraph=True) of the model layer: the host code traces, the ops stay whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import CLASSES, DECODERS, DIM, photographs, small_vit
from torch import Tensor

from step_kernels.model import LinearDecoder, PolicyNet, QuotaPolicy, StepEncoder, StepSegmenter, VariancePolicy


def compiled(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager")


def policy_cells(policy: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda images: policy(images, patch_size=8, num_prefix=1).cells


def merged_replay(images: Tensor) -> Callable[[Tensor], Tensor]:
    encoder = StepEncoder(small_vit(depth=2), VariancePolicy(0.1))
    trace = encoder(images).trace
    return lambda images: encoder(images, replay=trace).tokens


CASES: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "vit": lambda images: small_vit(depth=2),
    "variance policy": lambda images: policy_cells(VariancePolicy(0.1)),
    "quota policy": lambda images: policy_cells(QuotaPolicy(VariancePolicy(0.1), 5)),
    "policy net": lambda images: policy_cells(PolicyNet(width=2).eval()),
    "replayed merged encoder": merged_replay,
    **{
        f"segmenter, {name}": lambda images, kind=kind: StepSegmenter(
            StepEncoder(small_vit(depth=2)), kind(DIM, CLASSES)
        )
        for name, kind in DECODERS.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break(name: str) -> None:
    images = photographs(2, 64, 96)
    run = CASES[name](images)
    with torch.no_grad():
        torch.testing.assert_close(compiled(run)(images), run(images))  # tracing may decompose an op: fp32 rounding


def test_gradients_of_a_compiled_segmenter() -> None:
    images, gradients = photographs(1, 64, 64), []
    for wrap in (lambda model: model, compiled):
        segmenter = StepSegmenter(StepEncoder(small_vit(depth=1)), LinearDecoder(DIM, CLASSES))
        segmenter.decoder.head.weight.data.fill_(0.1)
        wrap(segmenter)(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in segmenter.parameters()])
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)
