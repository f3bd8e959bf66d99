"""halt_tokens and gather_tokens against loops over tokens and classes."""

from __future__ import annotations

import brute_force
import pytest
import torch
from cases.halting import NAN, check_halting, make_canvas, make_scores
from hypothesis import given
from hypothesis import strategies as st
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build, read
from random_layouts import plain_layouts
from tensors import IMAGE_VIEWS, LOW_PRECISION, ROW_VIEWS, poison, with_tail
from torch import Tensor

import step_kernels as sk


@pytest.mark.parametrize("keep_per_class", (0, 1, 3))
@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_decisions(name: str, spare: int | None, keep_per_class: int) -> None:
    plain = AWKWARD[name]
    layout = build(plain, spare)
    scores, canvas = make_scores(plain, layout.capacity), make_canvas(plain)
    before = canvas.clone()
    halting = sk.halt_tokens(scores, layout, 0.8, keep_per_class=keep_per_class, canvas=canvas)
    assert halting.canvas is canvas
    expected = brute_force.halt(scores, plain, 0.8, keep_per_class=keep_per_class)
    check_halting(halting, expected, scores, plain, before)


@given(
    plain_layouts(),
    st.sampled_from(SPARE_ROWS),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    st.integers(0, 3),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_ties(
    plain: PlainLayout, spare: int | None, threshold: float, keep: int, classes: int, random, on_device
) -> None:
    """Given probabilities in quarters: equal confidences, equal classes, and confidences equal to the threshold."""
    layout = build(plain, spare)
    choices = [0.0, 0.25, 0.5, 0.75, 1.0] * 3 + [NAN]
    rows = [[random.choice(choices) for _ in range(classes)] for _ in plain.tokens()]
    live = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), classes)
    scores = with_tail(live, layout.capacity)
    limit = torch.tensor(threshold) if on_device else threshold
    canvas = make_canvas(plain, classes, torch.float32)
    before = canvas.clone()
    halting = sk.halt_tokens(scores, layout, limit, activation=None, keep_per_class=keep, canvas=canvas)
    expected = brute_force.halt(scores, plain, threshold, None, keep)
    check_halting(halting, expected, scores, plain, before)


@pytest.mark.parametrize("keep_per_class", (0, 2))
@pytest.mark.parametrize("name", ("prefix_5", "ragged_3x5", "image_emptied", "holes", "all_halted", "empty_batch"))
def test_replay(name: str, keep_per_class: int) -> None:
    """The mask decides; confident tokens that it lets live are written as context; prefix tokens never halt."""
    plain = AWKWARD[name]
    layout = build(plain, 3)
    scores, canvas = make_scores(plain, layout.capacity), make_canvas(plain)
    mask = torch.rand(layout.capacity) < 0.5
    mask[len(plain.tokens()) :] = True
    for index, token in enumerate(plain.tokens()):
        if token.side == 0:
            mask[index] = True
        elif scores[index].isnan().any():
            mask[index] = False
    before = canvas.clone()
    halting = sk.halt_tokens(scores, layout, 0.8, keep_per_class=keep_per_class, canvas=canvas, halted=mask)
    expected = brute_force.halt(scores, plain, 0.8, keep_per_class=keep_per_class, mask=mask.tolist()[:-3])
    check_halting(halting, expected, scores, plain, before)


def test_values_are_converted_to_the_dtype_of_the_canvas() -> None:
    plain = AWKWARD["holes"]
    layout = build(plain, 3)
    scores = make_scores(plain, layout.capacity, dtype=torch.bfloat16)
    canvas = make_canvas(plain, dtype=torch.float32)
    before = canvas.clone()
    halting = sk.halt_tokens(scores, layout, 0.7, canvas=canvas)
    check_halting(halting, brute_force.halt(scores, plain, 0.7), scores.float(), plain, before)


@pytest.mark.parametrize("name", ("prefix_5", "image_emptied", "all_halted"))
def test_replaying_its_own_decisions_changes_nothing(name: str) -> None:
    plain = AWKWARD[name]
    layout = build(plain, 3)
    scores = make_scores(plain, layout.capacity)
    canvases = [torch.zeros_like(make_canvas(plain)) for _ in range(2)]
    free = sk.halt_tokens(scores, layout, 0.8, keep_per_class=1, canvas=canvases[0])
    replayed = sk.halt_tokens(scores, layout, 0.8, keep_per_class=1, canvas=canvases[1], halted=free.halted)
    assert torch.equal(canvases[0], canvases[1])
    assert torch.equal(free.halted, replayed.halted) and torch.equal(free.rows, replayed.rows)
    assert read(free.layout) == read(replayed.layout)


def test_values_other_than_the_scores() -> None:
    plain = AWKWARD["prefix_5"]
    layout = build(plain, 3)
    scores, canvas = make_scores(plain, layout.capacity), make_canvas(plain, 7)
    values = poison(torch.randn(layout.capacity, 7, dtype=torch.float64), len(plain.tokens()))
    before = canvas.clone()
    halting = sk.halt_tokens(scores, layout, 0.7, keep_per_class=1, values=values, canvas=canvas)
    check_halting(halting, brute_force.halt(scores, plain, 0.7, keep_per_class=1), values, plain, before)


def test_without_a_canvas() -> None:
    plain = AWKWARD["holes"]
    layout = build(plain, 3)
    scores = make_scores(plain, layout.capacity)
    check_halting(sk.halt_tokens(scores, layout, 0.8), brute_force.halt(scores, plain, 0.8), scores, plain, None)


@pytest.mark.parametrize("view", IMAGE_VIEWS)
def test_canvas_of_any_strides(view: str) -> None:
    plain = AWKWARD["holes"]
    layout = build(plain)
    scores, canvas = make_scores(plain, layout.capacity), IMAGE_VIEWS[view](make_canvas(plain))
    before = canvas.clone()
    halting = sk.halt_tokens(scores, layout, 0.7, canvas=canvas)
    check_halting(halting, brute_force.halt(scores, plain, 0.7), scores, plain, before)


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_row_strides(view: str) -> None:
    plain = AWKWARD["prefix_5"]
    layout = build(plain, 3)
    change = ROW_VIEWS[view]
    scores, values = make_scores(plain, layout.capacity), torch.randn(layout.capacity, 6, dtype=torch.float64)
    canvas = make_canvas(plain, 6)
    before = canvas.clone()
    mask = torch.rand(layout.capacity, 2).lt(0.3)[:, 1]
    for index in range(layout.capacity):
        mask[index] &= not bool(scores[index].isnan().any())
    halting = sk.halt_tokens(change(scores), layout, 0.7, values=change(values), canvas=canvas, halted=mask)
    expected = brute_force.halt(scores, plain, 0.7, mask=mask.tolist()[:-3])
    check_halting(halting, expected, values, plain, before)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_confidence_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    """bf16 has three digits: its softmax could not tell 0.995 from 0.999."""
    plain = AWKWARD["all_sides_16"]
    layout = build(plain)
    scores, canvas = make_scores(plain, layout.capacity, 5, dtype), make_canvas(plain, 5, dtype)
    before = canvas.clone()
    halting = sk.halt_tokens(scores, layout, 0.8, keep_per_class=2, canvas=canvas)
    check_halting(halting, brute_force.halt(scores, plain, 0.8, keep_per_class=2), scores, plain, before)


def confidence_of(row: list[float], threshold: float | Tensor, activation: str | None = None, **options) -> sk.Halting:
    layout = sk.SupertokenLayout.uniform(1, (1, 1))
    scores = torch.tensor([row], dtype=options.pop("dtype", torch.float32))
    return sk.halt_tokens(scores, layout, threshold, activation=activation, **options)


@pytest.mark.parametrize("on_device", (False, True))
@pytest.mark.parametrize(
    "row, threshold, halts",
    [
        ([0.5, 0.25], 0.5, False),
        ([0.5, 0.25], 0.4999, True),
        ([0.1, 0.0], 0.1, False),  # float32(0.1) > 0.1 in fp64, but not in fp32
        ([0.0, 0.0], 0.0, False),
        ([0.0, 1.0], 1.0, False),
        ([NAN, 1.0], 0.0, False),
        ([1.0], 0.999, True),
        ([0.9, 0.1], float("inf"), False),
        ([0.9, 0.1], -1.0, True),
    ],
)
def test_threshold(row: list[float], threshold: float, halts: bool, on_device: bool) -> None:
    limit = torch.tensor(threshold) if on_device else threshold
    assert confidence_of(row, limit).halted.tolist() == [halts]


def test_threshold_and_confidence_meet_in_single_precision() -> None:
    """A confidence that only fp64 can tell from the threshold does not exceed it."""
    for dtype in (torch.float32, torch.float64):
        limit = torch.tensor(0.7, dtype=dtype)
        assert not confidence_of([0.7 + 1e-12, 0.0], limit, dtype=torch.float64).halted.any()
    assert confidence_of([0.7 + 1e-6, 0.0], 0.7, dtype=torch.float64).halted.all()


def test_overflowed_scores_never_halt() -> None:
    """A head that overflowed fp16 gives infinities, whose softmax is no number."""
    layout = sk.SupertokenLayout.uniform(1, (1, 4))
    inf = float("inf")
    scores = torch.tensor([[inf, 0.0], [9.0, 0.0], [-inf, -inf], [0.0, -inf]], dtype=torch.float16)
    halting = sk.halt_tokens(scores, layout, 0.5)
    assert halting.halted.tolist() == [False, True, False, True]
    large = torch.tensor([[6e4, -6e4]] * 4, dtype=torch.float16)
    assert sk.halt_tokens(large, layout, 0.5).confidence.tolist() == [1.0] * 4


def test_batch_mates_do_not_matter() -> None:
    plain = AWKWARD["ragged_3x5"]
    scores = make_scores(plain, len(plain.tokens()), dtype=torch.float32)
    together = sk.halt_tokens(scores, build(plain), 0.7, keep_per_class=2)
    starts = plain.cu_seqlens()
    for index, blocks in enumerate(plain.images):
        rows = slice(starts[index], starts[index + 1])
        alone = sk.halt_tokens(scores[rows], build(PlainLayout((blocks,), plain.grid)), 0.7, keep_per_class=2)
        assert torch.equal(alone.halted, together.halted[rows])
        assert torch.equal(alone.confidence.nan_to_num(-1), together.confidence[rows].nan_to_num(-1))


def test_no_gradient_through_the_decision() -> None:
    plain = AWKWARD["ragged_3x5"]
    scores = make_scores(plain, len(plain.tokens())).requires_grad_()
    halting = sk.halt_tokens(scores, build(plain), 0.7)
    assert not halting.confidence.requires_grad
    with pytest.raises(ValueError, match="gradient"):
        sk.halt_tokens(scores, build(plain), 0.7, canvas=make_canvas(plain))
