"""The contenders of `bench model`: each passes the gate, does the work that it claims, and repeats decisions that it is given."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_model_cases import CPU, contender, eager_graphs, nano_case, nano_preset
from torch import Tensor

from bench import compiling
from bench.kernels.operation import Unavailable
from bench.model import buckets, gate, grouped
from bench.model.case import MERGED, MERGED_EXITS, Case
from bench.model.layouts import KINDS
from bench.model.ours import recorded_model, scores_and_labels
from bench.model.recorded import RecordedModel, RecordedPolicy, decision_tensors, own_copy
from bench.model.registry import (
    BUCKETS,
    CONTENDERS,
    CUDA,
    DENSE,
    DENSE_OURS,
    EXACT_GRAPH,
    EXITS_EXACT,
    EXITS_STATIC,
    EXITS_STATIC_EAGER,
    FRONT,
    GROUPED,
    MERGED_EXACT,
    MERGED_STATIC,
    NAMES,
    PARTS,
    Built,
    Contender,
)
from step_kernels import SupertokenLayout, ragged_linear
from step_kernels.model import Stage, StepEncoder, StepSegmenter, Trace, packed
from step_kernels.model.graph import capture

ANYWHERE = [DENSE, FRONT, EXITS_EXACT, MERGED_EXACT, PARTS, EXITS_STATIC_EAGER]
GRAPHS = [EXITS_STATIC, MERGED_STATIC, EXACT_GRAPH, DENSE_OURS, BUCKETS, GROUPED]


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


@pytest.fixture(scope="module")
def case() -> Case:
    return nano_case()


@pytest.fixture(scope="module")
def truths(case: Case) -> gate.Truths:
    return gate.Truths(case)


def verdict(case: Case, name: str, built: Built, truths: gate.Truths | None = None) -> gate.Verdict:
    return gate.check(case, contender(name), built, truths or gate.Truths(case))


def test_everybody_is_tested_here() -> None:
    assert sorted(NAMES) == sorted(ANYWHERE + GRAPHS)
    assert len(set(NAMES)) == len(NAMES)
    assert sorted(GRAPHS) == sorted(one.name for one in CONTENDERS if CUDA in one.needs)


@pytest.mark.parametrize("name", ANYWHERE)
def test_contenders_of_any_machine_pass(case: Case, truths: gate.Truths, name: str) -> None:
    assert contender(name).missing(CPU) is None
    built = contender(name).build(case)
    found = verdict(case, name, built, truths)
    assert found.passed, found
    assert 0 < found.max_error < 1e-4


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_unavailable_on_a_cpu(name: str) -> None:
    assert contender(name).missing(CPU) == "needs a CUDA device"


@pytest.mark.parametrize("name", [*GRAPHS, DENSE, FRONT])
def test_graphs_pass_on_other_inputs_than_the_captured_one(
    case: Case, truths: gate.Truths, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == GROUPED:  # whatever the dtype
        monkeypatch.setattr(grouped, "grouped_static", lambda case: with_fake_grouped_mm(case))
    before = [tensor.clone() for trace in case.traces for tensor in capture.tensors_of(trace)]
    with eager_graphs():
        assert 0 not in gate.compared_inputs(len(case.inputs))
        built = contender(name).build(case)
        found = verdict(case, name, built, truths)
    assert found.passed, found
    after = [tensor for trace in case.traces for tensor in capture.tensors_of(trace)]
    assert all(map(torch.equal, before, after)), "the recorded decisions were written over"
    case.weights.kept.clear()  # of dense: a graph that only this test can replay


def with_fake_grouped_mm(case: Case) -> Built:
    return grouped.static_graph(case, MERGED_EXITS, lambda: grouped.through(fake_grouped_mm))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", [EXITS_EXACT, EXITS_STATIC_EAGER, PARTS])
def test_adversarial_layouts_pass_too(kind: str, name: str) -> None:
    case = nano_case(kind, batch=3)
    assert verdict(case, name, contender(name).build(case)).passed


def test_bfloat16_passes_too() -> None:
    case = nano_case(dtype="bfloat16")
    truths = gate.Truths(case)
    for name in ANYWHERE:
        found = verdict(case, name, contender(name).build(case), truths)
        assert found.passed, (name, found)
        assert found.allowed_error > 1e-3


@pytest.mark.parametrize(
    ("name", "family"), [(EXITS_STATIC, MERGED_EXITS), (MERGED_STATIC, MERGED), (EXITS_EXACT, MERGED_EXITS)]
)
def test_the_policy_is_asked_every_time(case: Case, name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = type(case.weights.policy).forward

    def forward(policy: Any, images: Tensor, **options: Any) -> SupertokenLayout:
        asked.append(images.shape)
        return real(policy, images, **options)

    monkeypatch.setattr(type(case.weights.policy), "forward", forward)
    with eager_graphs():
        built = contender(name).build(case)
        asked.clear()
        for number in range(3):
            built.labels(number)
    assert asked == [case.inputs[0].shape] * 3


def test_the_parts_ask_the_policy_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = type(case.weights.policy).scores
    monkeypatch.setattr(
        type(case.weights.policy),
        "scores",
        lambda policy, images, **options: asked.append(1) or real(policy, images, **options),
    )
    built = contender(PARTS).build(case)
    asked.clear()
    built.labels(0)
    assert asked == [1]


@pytest.mark.parametrize("name", [DENSE, PARTS, BUCKETS])
def test_what_is_compiled_is_compiled_once_whoever_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate and graphs call without gradients, the clock with: a second compilation would be outside of the budget."""
    compiled, real = [], torch.compile

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend=count, dynamic=False))
    monkeypatch.setattr(compiling, "_load_compiler", lambda: None)
    monkeypatch.setattr(compiling, "_compiling_alone", lambda device: contextlib.nullcontext())
    case = nano_case()
    case.compiling = compiling.CompileBudget(1.0, CPU)
    try:
        with eager_graphs():
            built = contender(name).build(case)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    built.labels(0), built.scores(0)
    finally:
        torch.compiler.reset()
    assert len(compiled) == 1 and "eager" not in built.variant


@pytest.mark.parametrize("family", [MERGED, MERGED_EXITS])
def test_exact_sizes_known_to_the_host_equal_the_model_and_count_nothing(
    case: Case, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the exact-size graph captures: no layout is counted, which would wait for the device."""
    weights = case.weights
    exits = weights.exits if family == MERGED_EXITS else None
    segmenter = StepSegmenter(StepEncoder(weights.vit, None, exits), weights.decoder).eval()
    expected = []
    for images, trace in zip(case.inputs, case.decisions(family), strict=True):
        with torch.no_grad():
            expected.append((segmenter(images, replay=trace), segmenter.predict(images, replay=trace)))
    model = recorded_model(case, family)
    monkeypatch.setattr(RecordedPolicy, "forward", lambda policy, images, **options: policy.layout)
    real = SupertokenLayout.num_tokens.fget

    def counted(layout: SupertokenLayout) -> int:
        assert layout.trimmed, "the number of tokens was read from the device"
        return real(layout)

    monkeypatch.setattr(SupertokenLayout, "num_tokens", property(counted))
    for images, trace, (scores, labels) in zip(case.inputs, case.decisions(family), expected, strict=True):
        model.hold(trace)
        own_scores, own_labels = scores_and_labels(model.segmenter)(images)
        assert torch.equal(own_scores, scores) and torch.equal(own_labels, labels)
        model.hold(trace.untrim())
        with pytest.raises(AssertionError, match="read from the device"), torch.no_grad():
            model.segmenter(images)


def test_decisions_are_held_or_loaded(case: Case) -> None:
    model = recorded_model(case, MERGED_EXITS)
    with pytest.raises(ValueError, match="stage after block"):
        wrong = dataclasses.replace(case.traces[0].stages[0], block=1)
        model.hold(dataclasses.replace(case.traces[0], stages=(wrong,)))


def test_own_copies_share_no_memory(case: Case) -> None:
    """Even where nothing merges, so that untrimming has nothing to add."""
    halted = torch.zeros(case.uniform.capacity, dtype=torch.bool)
    trace = Trace(case.uniform, (Stage(2, halted, case.uniform),))
    for own, recorded in zip(decision_tensors(own_copy(trace)), decision_tensors(trace), strict=True):
        assert torch.equal(own, recorded)
        assert own.data_ptr() != recorded.data_ptr()


@pytest.mark.parametrize("fault", ["stale decisions", "stale images", "off", "cached", "labels", "shape", "NaN"])
def test_wrong_contenders_fail(case: Case, truths: gate.Truths, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stale decisions":
        monkeypatch.setattr(RecordedModel, "load", lambda model, decisions: None)
    with eager_graphs():
        honest = contender(EXITS_STATIC).build(case)
        assert fault == "stale decisions" or verdict(case, EXITS_STATIC, honest, truths).passed
        faults: dict[str, Callable[[], Built]] = {
            "stale decisions": lambda: honest,
            "stale images": lambda: dataclasses.replace(
                honest, scores=lambda number: honest.scores(0), labels=lambda number: honest.labels(0)
            ),
            "off": lambda: dataclasses.replace(honest, scores=lambda number: honest.scores(number) + 1e-4),
            "cached": lambda: cached(honest),
            "labels": lambda: dataclasses.replace(honest, labels=lambda number: (honest.labels(number) + 1) % 5),
            "shape": lambda: dataclasses.replace(honest, labels=lambda number: honest.labels(number)[:, :-1]),
            "NaN": lambda: dataclasses.replace(honest, scores=lambda number: honest.scores(number) * float("nan")),
        }
        assert not verdict(case, EXITS_STATIC, faults[fault](), truths).passed


def cached(honest: Built) -> Built:
    """Answers every question as the last one."""
    last = honest.scores(2).clone(), honest.labels(2).clone()
    return dataclasses.replace(honest, scores=lambda number: last[0], labels=lambda number: last[1])


def test_a_wrong_part_of_a_model_fails(case: Case, truths: gate.Truths) -> None:
    honest = contender(FRONT).build(case)
    wrong = dataclasses.replace(honest, scores=lambda number: honest.scores(number).roll(1, 0))
    assert not verdict(case, FRONT, wrong, truths).passed


def test_ours_are_allowed_less_than_rivals(case: Case, truths: gate.Truths) -> None:
    built = contender(EXITS_EXACT).build(case)
    strict = gate.check(case, contender(EXITS_EXACT), built, truths)
    lenient = gate.check(case, dataclasses.replace(contender(EXITS_EXACT), ours=False), built, truths)
    assert strict.allowed_error < lenient.allowed_error < 8 * strict.allowed_error


def test_needs() -> None:
    one = Contender("one", "dense", "dense.dense", needs=(CUDA, "torch.nn.no_such_thing", "torch.nn.Linear"))
    assert one.missing(CPU) == "needs a CUDA device and torch.nn.no_such_thing"
    assert dataclasses.replace(one, needs=("no_such_package.thing",)).missing(CPU) == "needs no_such_package.thing"
    assert dataclasses.replace(one, needs=(CUDA,)).missing(torch.device("cuda")) is None


def fake_grouped_mm(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """One group; rows beyond it hold NaN, as uninitialised memory may."""
    assert weights.shape[0] == offs.shape[0] == 1 and offs.dtype == torch.int32
    out = x @ weights[0]
    out[int(offs[0]) :] = float("nan")
    return out


def test_grouped_linear_equals_ours_on_live_rows() -> None:
    torch.manual_seed(0)
    layout = SupertokenLayout.from_sides(torch.full((1, 4, 4), 2), num_prefix=1)
    x, residual = torch.randn(17, 8), torch.randn(17, 6)
    weight, bias = torch.randn(6, 8), torch.randn(6)
    for options in ({}, {"activation": "gelu"}, {"activation": "gelu_tanh", "residual": residual}):
        ours = ragged_linear(x, weight, bias, layout=layout, **options)
        theirs = grouped.grouped_linear(fake_grouped_mm, x, weight, bias, layout=layout, **options)
        torch.testing.assert_close(theirs[:5], ours[:5], atol=1e-5, rtol=0)
        assert theirs[5:].isnan().all()


def test_grouped_mm_takes_untrimmed_layouts_only_and_is_put_back() -> None:
    ours, calls = packed.ragged_linear, []

    def counting(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        return fake_grouped_mm(*arguments, **options)

    untrimmed = SupertokenLayout.from_sides(torch.full((1, 4, 4), 2))
    x, weight = torch.randn(16, 8), torch.randn(6, 8)
    with pytest.raises(RuntimeError, match="on purpose"), grouped.through(counting):
        packed.ragged_linear(x, weight, None, layout=untrimmed)
        assert calls == [1]
        packed.ragged_linear(x[:4], weight, None, layout=untrimmed.trim())
        assert calls == [1]
        raise RuntimeError("on purpose")
    assert packed.ragged_linear is ours


def test_grouped_mm_by_whichever_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "grouped_mm", "new", raising=False)
    monkeypatch.setattr(torch, "_grouped_mm", "old", raising=False)
    assert grouped.find_grouped_mm() == "new"
    monkeypatch.delattr(F, "grouped_mm")
    assert grouped.find_grouped_mm() == "old"
    monkeypatch.delattr(torch, "_grouped_mm")
    with pytest.raises(Unavailable, match=r"has no torch\.nn\.functional\.grouped_mm"):
        grouped.find_grouped_mm()


def test_grouped_mm_needs_bfloat16(case: Case) -> None:
    with pytest.raises(Unavailable, match="needs bfloat16, this is float32"):
        grouped.grouped_static(case)


def test_buckets_need_varlen_attn(case: Case) -> None:
    with pytest.raises(Unavailable, match="needs a CUDA device and bfloat16 or float16, this is cpu and float32"):
        buckets.bucketed_parts(case)
