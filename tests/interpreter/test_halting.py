"""halt_tokens, gather_tokens and its gradient as kernels: against loops over tokens, and bit for bit against the reference."""

import brute_force
import pytest
import torch
from cases.halting import NAN, check_halting, make_canvas, make_scores, same_decisions
from floors import reference
from interpreter import supervision
from layouts import AWKWARD, PlainLayout, build
from tensors import IMAGE_VIEWS, LOW_PRECISION, ROW_VIEWS, error_rule, gradients, poison, with_tail

import step_kernels as sk
from step_kernels.triton.halting import compaction, decision, gather

INF = float("inf")
SMALL_BLOCKS = {
    decision: {"DECIDE_ROWS": ((8, 2, 4),), "KEEP_ROWS": 4, "KEEP_RIVALS": 4},
    compaction: {"COMPACT_ROWS": ((16, 8, 4),), "SUM_BLOCK": 2, "PAINT_CHANNELS": 2},
    gather: {"GATHER_TILES": ((16, 4),), "GATHER_COLUMNS": 4},
}


@pytest.fixture
def small_blocks(monkeypatch):
    for module, sizes in SMALL_BLOCKS.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours.contiguous().view(integer), theirs.contiguous().view(integer))


def same_but_for_the_canvas(ours: sk.Halting, theirs: sk.Halting) -> None:
    """Confidences to the last digits of fp32."""
    same_decisions(ours, theirs)
    torch.testing.assert_close(ours.confidence, theirs.confidence, rtol=1e-6, atol=0, equal_nan=True)


def compare(scores: torch.Tensor, layout: sk.SupertokenLayout, threshold, canvas=None, **options) -> sk.Halting:
    """Our result, after it was found equal to the reference's, canvas included."""
    theirs_canvas = None if canvas is None else canvas.clone()
    ours = sk.halt_tokens(scores, layout, threshold, canvas=canvas, **options)
    theirs = reference(sk.halt_tokens, scores, layout, threshold, canvas=theirs_canvas, **options)
    same_but_for_the_canvas(ours, theirs)
    if canvas is not None:
        same_bits(canvas, theirs_canvas)
    return ours


def check_gather(halting: sk.Halting, live: int, width: int = 3) -> None:
    """Forward and gradient, trimmed and not, with NaN past the live rows."""
    for stage in (halting, halting.trim()):
        count = halting.layout.num_tokens
        tokens = poison(torch.randn(halting.halted.shape[0], width), live).requires_grad_()
        cotangent = poison(torch.randn(stage.layout.capacity, width), count)
        packed = sk.gather_tokens(tokens, stage)
        same_bits(packed.detach(), reference(sk.gather_tokens, tokens, stage).detach())
        same_bits(sk.gather_tokens(tokens, stage, tail="undefined")[:count].detach(), packed[:count].detach())
        (ours,) = gradients(packed, [tokens], cotangent)
        (theirs,) = reference(lambda: gradients(sk.gather_tokens(tokens, stage), [tokens], cotangent))  # noqa: B023
        same_bits(ours, theirs)


@pytest.mark.parametrize(("spare", "seed", "keep"), [(0, None, 0), (3, 1, 2), (None, 2, 0)])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_layouts(name, spare, seed, keep, kernels):
    supervision.shuffle_programs(seed)
    plain = AWKWARD[name]
    layout = build(plain, spare)
    scores = make_scores(plain, layout.capacity, dtype=torch.float32)
    canvas = make_canvas(plain, dtype=torch.float32)
    before = canvas.clone()
    kernels.clear()
    halting = sk.halt_tokens(scores, layout, 0.8, keep_per_class=keep, canvas=canvas)
    expected = ["decide_kernel", "keep_kernel", "compact_kernel"] if keep else ["decide_kernel", "compact_kernel"]
    assert kernels == (expected if layout.capacity else [])
    check_halting(halting, brute_force.halt(scores, plain, 0.8, keep_per_class=keep), scores, plain, before)
    check_gather(halting, len(plain.tokens()))
    if not layout.capacity:
        kernels.append("no rows need no kernel")


def test_gathering_is_one_kernel_each_way(kernels):
    layout = build(AWKWARD["holes"], 3)
    halting = sk.halt_tokens(torch.randn(layout.capacity, 3), layout, 0.5)
    tokens = torch.randn(layout.capacity, 5, requires_grad=True)
    kernels.clear()
    sk.gather_tokens(tokens, halting).sum().backward()
    assert kernels == ["gather_kernel", "gather_backward_kernel"]


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("name", ["prefix_5", "ragged_3x5", "image_emptied", "first_and_last_emptied", "holes"])
def test_many_blocks_of_everything(name, keep, small_blocks):
    supervision.shuffle_programs(keep)
    plain = AWKWARD[name]
    layout = build(plain, 9)
    scores = make_scores(plain, layout.capacity, 5, torch.float32)
    halting = compare(scores, layout, 0.6, make_canvas(plain, 5, torch.float32), keep_per_class=keep)
    check_gather(halting, len(plain.tokens()), 7)


@pytest.mark.parametrize("scores_dtype", LOW_PRECISION)
@pytest.mark.parametrize("canvas_dtype", LOW_PRECISION)
def test_canvas_receives_converted_bits(scores_dtype, canvas_dtype):
    plain = AWKWARD["holes"]
    layout = build(plain, 3)
    scores = make_scores(plain, layout.capacity, 5, scores_dtype)
    values = (1000 * torch.randn(layout.capacity, 7)).to(scores_dtype)
    values[3, 2], values[5, 1], values[6, 0] = INF, 1e-7, 65504
    ours, theirs = (torch.zeros(2, 7, 6, 7, dtype=canvas_dtype) for _ in range(2))
    mask = torch.rand(layout.capacity) < 0.6
    same_but_for_the_canvas(
        sk.halt_tokens(scores, layout, 0.6, values=values, canvas=ours, halted=mask),
        reference(sk.halt_tokens, scores, layout, 0.6, values=values, canvas=theirs, halted=mask),
    )
    assert torch.equal(ours, theirs) and ours.any()


@pytest.mark.parametrize("view", IMAGE_VIEWS)
def test_canvas_of_any_strides(view):
    plain = AWKWARD["all_sides_16"]
    layout = build(plain)
    scores = make_scores(plain, layout.capacity, 5, torch.float32)
    canvas = IMAGE_VIEWS[view](make_canvas(plain, 5, torch.float32))
    assert compare(scores, layout, 0.7, canvas, keep_per_class=1).halted.any()


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_row_strides(view):
    plain = AWKWARD["prefix_5"]
    layout = build(plain, 3)
    change = ROW_VIEWS[view]
    scores = change(make_scores(plain, layout.capacity, dtype=torch.float32))
    values = change(torch.randn(layout.capacity, 6))
    mask = torch.rand(layout.capacity, 2).lt(0.3)[:, 1]
    halting = compare(scores, layout, 0.7, make_canvas(plain, 6, torch.float32), values=values, halted=mask)
    tokens = torch.randn(layout.capacity, 6)
    same_bits(sk.gather_tokens(change(tokens), halting), reference(sk.gather_tokens, tokens, halting))
    live = torch.ops.step_kernels.gather_tokens_backward(tokens[:, :1].expand(-1, 6), halting.rows, None, 40)
    assert live.shape == (40, 6)


def test_rows_beyond_two_to_the_thirty_one():
    """Row 3 of everything lies 3 * 2^30 elements in; only the pages that are touched exist."""
    plain = PlainLayout((((0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)),), (2, 2))
    layout, stride = build(plain), 2**30
    apart = torch.empty(3 * stride + 4, dtype=torch.bfloat16).as_strided((4, 4), (stride, 1))
    apart.copy_(3 * torch.randn(4, 4))
    canvas = torch.empty(3 * stride + 4, dtype=torch.bfloat16).as_strided((1, 4, 2, 2), (1, 1, 2 * stride, stride))
    canvas.zero_()
    ours = sk.halt_tokens(apart, layout, 1.0, canvas=canvas, halted=torch.tensor([True, False, False, True]))
    same_bits(canvas[0, :, 1, 1], apart[3])
    same_bits(canvas[0, :, 0, 0], apart[0])
    assert not canvas[0, :, 0, 1].any() and ours.rows.tolist() == [1, 2, 0, 0]
    same_but_for_the_canvas(ours, reference(sk.halt_tokens, apart.clone(), layout, 1.0, halted=ours.halted))
    kept = sk.halt_tokens(apart, layout, 0.5, halted=torch.tensor([True, True, False, False]))
    same_bits(sk.gather_tokens(apart, kept)[:2], apart[2:])
    grad = torch.ops.step_kernels.gather_tokens_backward(apart, torch.tensor([0, 2, 4, 5]).int(), None, 6)
    same_bits(grad[5], apart[3])


@pytest.mark.parametrize("activation", ["softmax", None])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_are_no_numbers(activation, forced, dtype, small_blocks):
    rows = [
        [NAN, 9.0, 0.0], [0.0, 0.0, NAN], [NAN, NAN, NAN], [INF, 0.0, 0.0], [INF, INF, -INF], [-INF, -INF, -INF],
        [-INF, -INF, 9.0], [INF, NAN, 0.0], [6e4, -6e4, 0.0], [6e4, 6e4, 6e4], [-6e4, -6e4, -5.9e4], [-0.0, 0.0, -0.0],
    ]  # fmt: skip
    layout = sk.SupertokenLayout.uniform(1, (3, 4))
    mask = torch.arange(12) % 3 == 0 if forced else None
    for classes in (3, 2, 1):
        scores = torch.tensor(rows, dtype=dtype)[:, :classes].contiguous()
        canvas = torch.zeros(1, classes, 3, 4, dtype=dtype)
        compare(scores, layout, 0.5, canvas, activation=activation, halted=mask, keep_per_class=1)


@pytest.mark.parametrize("classes", [1, 2, 150, 300])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_class_counts(classes, dtype):
    layout = sk.SupertokenLayout.uniform(1, (12, 16))
    scores = (4 * torch.randn(192, classes)).to(dtype)
    scores[4, -1] = scores[4, 0] = scores[4].max() + 3  # the lower of two equal classes
    canvas = torch.zeros(1, classes, 12, 16, dtype=dtype)
    halting = compare(scores, layout, 0.3, canvas)
    assert halting.labels[4] == 0 and halting.halted.any()
    if classes > 1:
        truth = reference(sk.halt_tokens, scores.double(), layout, 0.3).confidence
        error_rule(halting.confidence, reference(sk.halt_tokens, scores, layout, 0.3).confidence, truth.double())
    else:
        assert halting.confidence.eq(1).all()


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64])
@pytest.mark.parametrize("keep", [1, 2, 2**40])
def test_ties(dtype, keep, small_blocks):
    """Probabilities in quarters: equal confidences, equal classes, confidences equal to the threshold."""
    plain = AWKWARD["ragged_3x5"]
    layout = build(plain, 3)
    quarters = torch.randint(0, 5, (len(plain.tokens()), 3)) / 4
    quarters[::7, 1] = NAN
    quarters[::9, 0] = INF
    scores = with_tail(quarters, layout.capacity)
    threshold = torch.tensor(0.5, dtype=dtype)
    ours = sk.halt_tokens(scores, layout, threshold, activation=None, keep_per_class=keep)
    expected = brute_force.halt(scores, plain, 0.5, None, min(keep, 99))
    check_halting(ours, expected, scores, plain, None)
    assert keep > 2 or ours.halted.any()


def test_threshold_is_strict_and_single_precision():
    layout = sk.SupertokenLayout.uniform(1, (1, 2))
    scores = torch.tensor([[0.1, 0.0], [1.0, 0.0]])
    for threshold, halted in [(0.1, [False, True]), (1.0, [False, False]), (-1.0, [True, True]), (INF, [False, False])]:
        for limit in (threshold, torch.tensor(threshold), torch.tensor(threshold, dtype=torch.float64)):
            assert sk.halt_tokens(scores, layout, limit, activation=None).halted.tolist() == halted
    assert not sk.halt_tokens(torch.zeros(2, 1), layout, 1.0).halted.any()  # a softmax of one class is exactly 1
    assert not sk.halt_tokens(scores, layout, NAN).halted.any()


def test_prefix_tokens_stay_below_any_threshold():
    plain = AWKWARD["all_halted_prefix"]
    layout = build(plain, 3)
    halting = compare(torch.randn(layout.capacity, 3), layout, -1.0, make_canvas(plain, 3, torch.float32))
    assert halting.layout.num_tokens == layout.num_tokens


def test_all_none_and_one_image_halt():
    layout = sk.SupertokenLayout.uniform(3, (4, 5), side=1)
    scores = torch.randn(60, 4)
    for threshold, survivors in [(-1.0, 0), (1.0, 60)]:
        halting = compare(scores, layout, threshold, torch.zeros(3, 4, 4, 5))
        assert halting.layout.num_tokens == survivors
    mask = torch.arange(60) // 20 == 1
    halting = compare(scores, layout, 0.5, torch.zeros(3, 4, 4, 5), halted=mask)
    assert halting.layout.cu_seqlens.tolist() == [0, 20, 20, 40]
    check_gather(halting, 60)


@pytest.mark.parametrize("keep", [0, 1])
def test_many_tiny_images(keep):
    plain = PlainLayout((((0, 0, 1),), (), ((0, 0, 1),), ((0, 0, 1),)) * 64, (1, 1), 1)
    layout = build(plain, 5)
    scores = make_scores(plain, layout.capacity, 3, torch.float32)
    check_gather(compare(scores, layout, 0.8, keep_per_class=keep), layout.num_tokens)


@pytest.mark.parametrize("keep", [0, 2])
def test_replay(keep, kernels):
    """The mask decides, also for rows with a NaN; ``keep_per_class`` then costs no kernel."""
    plain = AWKWARD["prefix_5"]
    layout = build(plain, 3)
    scores = make_scores(plain, layout.capacity, dtype=torch.float32)
    mask = torch.rand(layout.capacity) < 0.5
    mask[-3:] = True
    kernels.clear()
    compare(scores, layout, 0.8, make_canvas(plain, dtype=torch.float32), halted=mask, keep_per_class=keep)
    assert kernels == ["decide_kernel", "compact_kernel"]


def test_batch_mates_do_not_matter():
    plain = AWKWARD["ragged_3x5"]
    scores = make_scores(plain, len(plain.tokens()), 150, torch.float32)
    together = sk.halt_tokens(scores, build(plain), 0.05, keep_per_class=2)
    starts = plain.cu_seqlens()
    for index, blocks in enumerate(plain.images):
        rows = slice(starts[index], starts[index + 1])
        alone = sk.halt_tokens(scores[rows], build(PlainLayout((blocks,), plain.grid)), 0.05, keep_per_class=2)
        same_bits(alone.halted, together.halted[rows])
        same_bits(alone.confidence, together.confidence[rows])


def test_nothing_behind_the_live_rows_is_read():
    """Row numbers in the tail point nowhere: following one would be an address error."""
    tokens, cu_seqlens = torch.randn(9, 5), torch.tensor([0, 1, 3], dtype=torch.int32)
    rows = torch.tensor([2, 5, 8, 2**31 - 1, -1], dtype=torch.int32)
    packed = torch.ops.step_kernels.gather_tokens(tokens, rows, cu_seqlens, True)
    same_bits(packed, torch.cat([tokens[[2, 5, 8]], torch.zeros(2, 5)]))
    grad = torch.ops.step_kernels.gather_tokens_backward(tokens[:5], rows, cu_seqlens, 9)
    same_bits(grad, torch.zeros(9, 5).index_copy(0, torch.tensor([2, 5, 8]), tokens[:3]))


def test_no_channels_and_no_columns(kernels):
    layout = sk.SupertokenLayout.uniform(2, (2, 3))
    scores = torch.randn(12, 3)
    halting = compare(scores, layout, 0.4, torch.zeros(2, 0, 2, 3), values=torch.zeros(12, 0))
    kernels.clear()
    assert sk.gather_tokens(torch.zeros(12, 0), halting).shape == (12, 0)
    assert torch.ops.step_kernels.gather_tokens_backward(torch.zeros(3, 0), halting.rows[:3], None, 12).shape == (12, 0)
    assert kernels == []
    kernels.append("nothing to copy needs no kernel")
