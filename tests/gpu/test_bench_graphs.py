"""The bench's own CUDA graphs on a GPU: graphs that share a pool, bucketed graphs of PyTorch's parts, graphs at exact sizes."""

from __future__ import annotations

import math

import pytest
import torch
from bench_model_cases import contender, nano_settings
from torch import Tensor

from bench.compiling import CompileBudget
from bench.kernels.operation import Unavailable
from bench.model import buckets, gate
from bench.model.case import Case, draw_case, draw_inputs, draw_weights
from bench.model.graphs import Replayed
from bench.model.layouts import ALL_HALTED, EMPTY_IMAGE, SPREAD
from bench.model.registry import BUCKETS, EXACT_GRAPH, Built
from step_kernels.model.graph.cuda_graph import GraphPool

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def tiny_case(kind: str) -> Case:
    """ViT-T at 256 px: some 300 tokens in a batch, so several tiles."""
    settings = nano_settings(device="cuda", dtype="bfloat16", models=("tiny",), sizes=(256,), batches=(3,), classes=21)
    weights = draw_weights(settings, "tiny")
    return draw_case(settings, weights, draw_inputs(settings, 3), kind, CompileBudget(0.0, CUDA))


def built_or_skipped(case: Case) -> Built:
    try:
        return contender(BUCKETS).build(case)
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_graphs_of_a_pool_share_its_memory() -> None:
    pool, x = GraphPool(), torch.randn(1 << 22, device=CUDA)

    def work() -> tuple[Tensor]:
        return ((x.sin() * 2).sum(),)

    first, second, own = Replayed(work, CUDA, pool=pool), Replayed(work, CUDA, pool=pool), Replayed(work, CUDA)
    assert second.memory_bytes < first.memory_bytes
    assert own.memory_bytes >= first.memory_bytes > x.nbytes
    for one in (second, first, own, second):
        torch.testing.assert_close(one()[0], work()[0])


@pytest.mark.parametrize("kind", [SPREAD, ALL_HALTED, EMPTY_IMAGE])
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_padding_is_never_read(kind: str, padding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = buckets.BucketedRunner.fill

    def fill(runner: buckets.BucketedRunner, tokens: Tensor, cu_seqlens: Tensor) -> None:
        real(runner, tokens, cu_seqlens)
        runner._tokens[tokens.shape[0] :] = padding

    monkeypatch.setattr(buckets.BucketedRunner, "fill", fill)
    case = tiny_case(kind)
    built = built_or_skipped(case)
    verdict = gate.check(case, contender(BUCKETS), built, gate.Truths(case))
    assert verdict.passed, verdict
    for number in range(len(case.inputs)):
        assert built.scores(number).isfinite().all()


@pytest.mark.parametrize("name", [BUCKETS, EXACT_GRAPH])
def test_results_outlive_the_next_replay(name: str) -> None:
    case = tiny_case(SPREAD)
    built = built_or_skipped(case) if name == BUCKETS else contender(name).build(case)
    numbers = range(len(case.inputs))
    kept = [(built.scores(number), built.labels(number)) for number in numbers]
    copies = [(scores.clone(), labels.clone()) for scores, labels in kept]
    for number in reversed(numbers):
        built.labels(number)
    for (scores, labels), (own_scores, own_labels) in zip(kept, copies, strict=True):
        assert torch.equal(scores, own_scores) and torch.equal(labels, own_labels)
    assert built.held_bytes > 0 and built.compile_seconds > 0
    verdict = gate.check(case, contender(name), built, gate.Truths(case))
    assert verdict.passed, verdict
