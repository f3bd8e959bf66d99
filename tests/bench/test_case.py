"""The case: one set of weights, calibrated decisions, rotating inputs, and a policy that the clock sees unless it is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.case import Case, threshold_for
from bench.images import VIEWS
from bench.providers import build_contenders


@pytest.mark.parametrize("count", [1, 3, 4])
def test_threshold_is_exceeded_by_the_asked_number(count: int) -> None:
    confidence = torch.tensor([0.2, 0.9, 0.4, 0.7, 0.1])
    threshold = threshold_for(confidence, count)
    assert int((confidence > threshold).sum()) == count
    assert not (confidence - threshold).abs().lt(0.04).any()  # halfway between two values, at least 0.1 apart


def test_threshold_for_none_and_for_all() -> None:
    confidence = torch.tensor([0.01, 1.0])
    assert not (confidence > threshold_for(confidence, 0)).any()
    assert (confidence > threshold_for(confidence, 2)).all()
    assert (confidence > threshold_for(confidence, 5)).all()


@pytest.mark.parametrize("halt", [0.0, 0.5, 1.0])
def test_asked_share_halts_over_all_exits(small_case: Callable[..., Case], halt: float) -> None:
    case = small_case(halt=halt, exits=(4, 8))
    exits = build_contenders(case)[-1]
    halted = [sum(int(trace.stages[stage].halted.sum()) for trace in exits.traces) for stage in range(2)]
    tokens = sum(trace.layout.num_tokens - trace.layout.batch_size for trace in exits.traces)
    assert halted == [round(halt * tokens / 2)] * 2


def test_policy_leaves_the_asked_number_of_tokens(small_case: Callable[..., Case]) -> None:
    for policy in ("variance", "given", "quota"):
        merged = build_contenders(small_case(policy=policy, exits=()))[-1]
        assert merged.name == "merged"
        counts = torch.cat([trace.layout.lengths() - 1 for trace in merged.traces])
        assert float(counts.float().mean()) == pytest.approx(16 / 1.6), policy


def test_inputs_are_the_pictures_in_all_eight_positions(small_case: Callable[..., Case]) -> None:
    case = small_case(inputs=VIEWS)
    pictures = case.photographs.tensor()
    assert len(case.inputs) == 8
    assert torch.equal(case.inputs[0], pictures)
    assert torch.equal(case.inputs[1], pictures.flip(-1))
    positions = [turned.flip(over) for turned in (pictures, pictures.mT) for over in ((), (-1,), (-2,), (-1, -2))]
    assert all(sum(torch.equal(images, position) for images in case.inputs) == 1 for position in positions)
    assert all(images.is_contiguous() for images in case.inputs)


def test_calibration_is_over_all_inputs(small_case: Callable[..., Case]) -> None:
    case = small_case(inputs=VIEWS, halt=0.3)
    exits = build_contenders(case)[-1]
    assert len(exits.traces) == VIEWS
    tokens = sum(trace.layout.num_tokens - trace.layout.batch_size for trace in exits.traces)
    assert tokens == round(2 * VIEWS * 16 / 1.6)
    assert sum(int(trace.stages[0].halted.sum()) for trace in exits.traces) == round(0.3 * tokens)


@pytest.mark.parametrize("policy", ["variance", "given", "quota"])
def test_decisions_are_those_of_a_free_run(small_case: Callable[..., Case], policy: str) -> None:
    case = small_case(policy=policy)
    for contender in build_contenders(case)[1:]:
        for images, trace in zip(case.inputs, contender.traces, strict=True):
            free = contender.model.trace(images)
            for one, other in zip((free, *free.stages), (trace, *trace.stages), strict=True):
                assert torch.equal(one.layout.cells, other.layout.cells)
                assert torch.equal(one.layout.cu_seqlens, other.layout.cu_seqlens)


def test_same_seed_means_the_same_weights(small_case: Callable[..., Case]) -> None:
    first, again, other = small_case(seed=1), small_case(seed=1), small_case(seed=2)
    for one, two in zip(first.vit.parameters(), again.vit.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.vit.pos_embed, other.vit.pos_embed)
    assert first.calibrated() == again.calibrated()


def test_contenders_share_their_parameters(small_case: Callable[..., Case]) -> None:
    case = small_case()
    for contender in build_contenders(case):
        assert contender.model.encoder.vit is case.vit
        assert contender.model.decoder is case.decoder


@pytest.mark.parametrize(("policy", "calls"), [("variance", 1), ("quota", 1), ("given", 0)])
def test_policy_runs_under_the_clock_unless_it_is_given(
    small_case: Callable[..., Case], policy: str, calls: int
) -> None:
    case = small_case(policy=policy)
    contenders = build_contenders(case)
    seen = []
    case.policy.register_forward_hook(lambda *_: seen.append(1))
    for contender in contenders:
        seen.clear()
        contender.labels(case.inputs[0], contender.traces[0])
        assert len(seen) == (0 if contender.name == "dense" else calls), contender.name


def test_dense_uses_no_op_of_the_package_before_the_tail(small_case: Callable[..., Case]) -> None:
    case = small_case()
    dense = build_contenders(case)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dense.labels(case.inputs[0], dense.traces[0])
    names = {event.key for event in profile.key_averages()}
    assert {name for name in names if name.startswith("step_kernels::")} == {"step_kernels::upsample_argmax"}
    assert any("scaled_dot_product" in name for name in names)
