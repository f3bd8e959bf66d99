"""PyTorch's parts in bucketed graphs: padding is there, is never read, and what a graph leaves behind is read before it is gone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bench_model_cases import CPU, contender, eager_graphs, fake_varlen_attn, nano_case, nano_preset
from torch import Tensor

from bench.compiling import CompileBudget
from bench.model import buckets, gate, parts
from bench.model.buckets import BucketedRunner, bucket_of, bucketed_parts
from bench.model.case import Case
from bench.model.layouts import KINDS
from bench.model.registry import BUCKETS, PARTS, Built
from step_kernels import SupertokenLayout


@pytest.fixture(autouse=True)
def graphs_of_small_tiles() -> Iterator[None]:
    """ViT nano has some 20 tokens, which one tile of a GPU would hold many times over.

    Patches of its own: a test's are gone before these.
    """
    with nano_preset(), eager_graphs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "TILE", 4)
        yield


class Padded(BucketedRunner):
    """Something else in the padding before every replay."""

    padding = 0.0
    calls: list[tuple[int, int]]

    def fill(self, tokens: Tensor, cu_seqlens: Tensor) -> None:
        super().fill(tokens, cu_seqlens)
        self._tokens[tokens.shape[0] :] = self.padding


def passes(case: Case, built: Built) -> bool:
    return gate.check(case, contender(BUCKETS), built, gate.Truths(case)).passed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
def test_padding_is_never_read(kind: str, padding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Padded, "padding", padding)
    monkeypatch.setattr(buckets, "BucketedRunner", Padded)
    case = nano_case(kind, batch=3)
    built = bucketed_parts(case)
    assert passes(case, built)
    eager = contender(PARTS).build(case)
    for number in range(len(case.inputs)):
        torch.testing.assert_close(built.scores(number), eager.scores(number), atol=1e-5, rtol=0)


def test_an_attention_that_reads_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding that the tests put there is there, and the gate sees what comes of it."""

    def greedy(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        whole = torch.cat([cu_q[:-1], cu_q.new_tensor([q.shape[0]])])
        return fake_varlen_attn(q, k, v, whole, whole, q.shape[0], q.shape[0])

    monkeypatch.setattr(Padded, "padding", math.nan)
    monkeypatch.setattr(buckets, "BucketedRunner", Padded)
    monkeypatch.setattr(buckets, "find_varlen", lambda case: greedy)
    case = nano_case()
    assert not passes(case, bucketed_parts(case))


def test_every_launch_has_the_size_of_its_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, live = [], []

    def attention(q: Tensor, *others: Any) -> Tensor:
        launches.append((q.shape[0], others[-1]))
        live.append(int(others[2][-1]))
        return fake_varlen_attn(q, *others)

    monkeypatch.setattr(buckets, "find_varlen", lambda case: attention)
    case = nano_case(batch=3)
    built = bucketed_parts(case)
    for number, trace in enumerate(case.traces):
        launches.clear(), live.clear()
        built.labels(number)
        stages = [trace.layout, trace.layout, trace.final_layout]  # of the three blocks
        sizes = [(layout.capacity, int(layout.lengths().max())) for layout in stages]
        assert live == [rows for rows, _ in sizes]
        assert launches == [(bucket_of(rows, 1 / 16), bucket_of(longest, 1 / 4)) for rows, longest in sizes]
        assert all(rows % 4 == longest % 4 == 0 for rows, longest in launches)


def test_graphs_are_recorded_at_the_start_and_their_cost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    runners = []
    real = BucketedRunner.__init__

    def init(runner: BucketedRunner, *arguments: Any) -> None:
        real(runner, *arguments)
        runners.append(runner)

    monkeypatch.setattr(BucketedRunner, "__init__", init)
    case = nano_case(batch=3)
    built = bucketed_parts(case)
    (runner,) = runners
    graphs = dict(runner._graphs)
    rows = [rows for segment, rows, _ in graphs if len(segment.blocks) == 2]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) > 1  # the largest first into the pool
    layouts = [
        (segment, layout) for trace in case.traces for segment, layout in enumerate([trace.layout, trace.final_layout])
    ]
    buckets_seen = {
        (segment, bucket_of(layout.capacity, 1 / 16), bucket_of(int(layout.lengths().max()), 1 / 4))
        for segment, layout in layouts
    }
    assert len(graphs) == len(buckets_seen) > 2
    blocks = (2, 1)
    live = sum(blocks[segment] * layout.capacity for segment, layout in layouts)
    padded = sum(blocks[segment] * bucket_of(layout.capacity, 1 / 16) for segment, layout in layouts)
    assert built.variant.startswith(
        f"varlen_attn, {len(graphs)} CUDA graphs in buckets of sizes, {padded / live - 1:.1%} padding, merged by pooled "
    )
    assert "for the sizes of these inputs alone" in built.note and "not compiled" in built.note
    assert built.compile_seconds == pytest.approx(0.5 * len(graphs))
    cells = case.uniform.capacity
    inputs = 4 * 48 * bucket_of(cells, 1 / 16) + 4 * 4
    assert built.held_bytes == 1000 * len(graphs) + inputs
    for number in range(len(case.inputs)):
        built.labels(number), built.scores(number)
    assert runner._graphs == graphs


def test_the_policy_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case, asked = nano_case(), []
    built = bucketed_parts(case)
    monkeypatch.setattr(parts.PartsModel, "ask_policy", lambda model, images: asked.append(images))
    built.labels(1)
    assert len(asked) == 1 and asked[0] is case.inputs[1]


@pytest.mark.parametrize("waste", [1 / 16, 1 / 4])
def test_buckets(waste: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "TILE", 128)
    counts = [*range(1, 3000), *range(3000, 140000, 317), 4097, 8 * 4097, 32 * 4097]
    for count in counts:
        bucket = bucket_of(count, waste)
        assert count <= bucket and bucket % 128 == 0
        assert bucket - count < max(128, waste * count)
        assert bucket_of(bucket, waste) == bucket
    found = [bucket_of(count, waste) for count in sorted(counts)]
    assert found == sorted(found)
    one_doubling = {bucket_of(count, waste) for count in range(2**15 + 1, 2**16 + 1)}
    assert len(one_doubling) == 1 / waste


def test_the_longest_image_is_that_of_the_layout_at_hand() -> None:
    """After an exit, images are shorter; a layout with one long image needs a bucket for it."""
    case = nano_case()
    runner = BucketedRunner(case, fake_varlen_attn)
    segment = parts.segments(case.weights)[0]
    for sides in ([1, 1], [1, 2], [2, 2]):
        layout = SupertokenLayout.from_sides(torch.stack([torch.full((4, 4), side) for side in sides]), num_prefix=1)
        layout = layout.trim()
        runner(segment, torch.randn(layout.capacity, 48), layout)
    assert [key[1:] for key in runner._graphs] == [(36, 20), (24, 20), (12, 8)]


def test_segments_are_the_whole_model() -> None:
    weights = nano_case().weights
    cut = parts.segments(weights)
    assert [len(segment.blocks) for segment in cut] == [2, 1]
    assert [block for segment in cut for block in segment.blocks] == list(weights.vit.blocks)
    assert cut[0].head is weights.exits[2].head and cut[0].norm is weights.exits[2].norm
    assert cut[1].head is weights.decoder.head and cut[1].norm is weights.vit.norm
    assert len(parts.segments(dataclasses.replace(weights, exits={}))) == 1


def test_an_exit_repeats_the_decision_however_sure_it_is() -> None:
    layout = SupertokenLayout.from_sides(torch.full((1, 2, 2), 1), num_prefix=1).trim()
    halted = torch.tensor([False, True, False, True, False])
    for share in (0.99, 0.21):  # of the first of five classes
        log_probabilities = torch.tensor([share] + [(1 - share) / 4] * 4).log().expand(5, 5)
        tokens, canvas = torch.arange(10.0).view(5, 2), torch.zeros(1, 5, 2, 2)
        survivors, left = parts.exit_stage(tokens, log_probabilities, canvas, layout, halted)
        assert survivors.tolist() == [[0, 1], [4, 5], [8, 9]] and left.cu_seqlens.tolist() == [0, 3]
        assert (canvas[0, 0] < 0).tolist() == [[True, False], [True, False]]


def test_the_tail_is_compiled_once_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    case, spent = nano_case(), []
    monkeypatch.setattr(case.compiling, "spend", lambda call: spent.append(call) or "not today")
    for build in (bucketed_parts, parts.pytorch_parts):
        built = build(case)
        assert built.variant.endswith("eager tail") and "not today" in built.note
    assert len(spent) == 1


def test_what_the_model_raises_is_not_put_down_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tail would be eager for everybody who comes after it."""
    case = nano_case()
    case.compiling = CompileBudget(1.0, CPU)

    def full(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parts, "transformer_block", full)
    with pytest.raises(torch.OutOfMemoryError):
        parts.pytorch_parts(case)
    assert ("tail", case.batch) not in case.weights.kept and case.compiling.spent == 0
