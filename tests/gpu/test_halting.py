"""Exit stages on a GPU: against the CPU reference, without syncs, captured and replayed, repeatable, beyond 2^31 elements."""

from collections.abc import Callable

import pytest
import torch
from cases.halting import head_inputs, same_decisions
from floors import double, reference
from gpu.syncs import capture, needs_memory, no_sync, ten_runs_are_identical
from layouts import mixed
from tensors import LOW_PRECISION, error_rule, identical, matmuls_in, poison
from torch import Tensor

import step_kernels as sk

pytestmark = pytest.mark.gpu

MARGIN = {
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}  # decisions closer to call than this may differ


def without_sync(function: Callable, *arguments, **named):
    """The result, found without one host sync."""
    with no_sync():
        return function(*arguments, **named)


def make_layout(batch: int) -> sk.SupertokenLayout:
    return mixed(batch, (64, 64))


def rows_of(layout: sk.SupertokenLayout, width: int, dtype: torch.dtype) -> Tensor:
    """Random rows, NaN past the live count."""
    return poison((2 * torch.randn(layout.capacity, width)).to(dtype), layout.num_tokens)


@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize(("classes", "threshold"), [(1, 0.5), (19, 0.45), (150, 0.3), (300, 0.2)])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_halt_tokens_equals_the_reference(dtype, classes, threshold, keep):
    layout = make_layout(4)
    scores = rows_of(layout, classes, dtype)
    canvas = torch.randn(4, 64, 64, classes).to(dtype).permute(0, 3, 1, 2)
    on_gpu, layout_gpu, canvas_gpu = scores.cuda(), layout.to("cuda"), canvas.cuda()
    ours = without_sync(sk.halt_tokens, on_gpu, layout_gpu, threshold, keep_per_class=keep, canvas=canvas_gpu)
    truth = reference(sk.halt_tokens, scores.double(), layout, threshold)
    plain = reference(sk.halt_tokens, scores, layout, threshold)
    error_rule(ours.confidence.cpu(), plain.confidence, truth.confidence)
    assert torch.equal(ours.labels.cpu(), plain.labels)
    # Last digits of confidences differ and may decide a rank or a close call: decide again from ours.
    confident = ours.confidence.cpu()[:, None].expand(-1, max(classes, 2)).contiguous()
    confident[:, 1:] = 0
    close = (truth.confidence - threshold).abs() < 1e-5
    if keep == 0:
        assert torch.equal(ours.halted.cpu()[~close], plain.halted[~close])
        assert torch.equal(
            ours.halted.cpu(), reference(sk.halt_tokens, confident, layout, threshold, activation=None).halted
        )
    replayed = reference(sk.halt_tokens, scores, layout, threshold, halted=ours.halted.cpu(), canvas=canvas)
    same_decisions(ours, replayed)
    if not close.any():
        assert torch.equal(canvas_gpu.cpu(), canvas)
    tokens = rows_of(layout, 384, dtype).cuda().requires_grad_()
    packed = without_sync(sk.gather_tokens, tokens, ours)
    assert torch.equal(packed.cpu(), reference(sk.gather_tokens, tokens.cpu(), replayed))
    cotangent = torch.randn_like(packed)
    (grad,) = torch.autograd.grad(packed, tokens, cotangent)
    expected, count = torch.zeros_like(tokens), ours.layout.num_tokens
    expected[ours.rows[:count].long()] = cotangent[:count]
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("classes", [1, 40, 300])
def test_context_is_exact_at_ties(classes):
    """Probabilities in sixteenths: many equal confidences, and no rounding at all."""
    layout = make_layout(3)
    scores = torch.randint(0, 17, (layout.capacity, classes)).float() / 16
    ours = sk.halt_tokens(scores.cuda(), layout.to("cuda"), 0.5, activation=None, keep_per_class=3)
    theirs = reference(sk.halt_tokens, scores, layout, 0.5, activation=None, keep_per_class=3)
    same_decisions(ours, theirs)
    assert torch.equal(ours.confidence.cpu(), theirs.confidence)


def test_canvas_of_other_strides_and_dtypes():
    layout = make_layout(2)
    scores, values = rows_of(layout, 7, torch.bfloat16), rows_of(layout, 200, torch.float32)
    mask = torch.rand(layout.capacity) < 0.6
    for dtype in LOW_PRECISION:
        for shape, order in [((2, 200, 64, 64), (0, 1, 2, 3)), ((64, 64, 200, 2), (3, 2, 1, 0))]:
            canvas = torch.randn(shape).to(dtype).permute(order)
            ours = canvas.cuda()
            sk.halt_tokens(scores.cuda(), layout.to("cuda"), 1.0, values=values.cuda(), canvas=ours, halted=mask.cuda())
            reference(sk.halt_tokens, scores, layout, 1.0, values=values, canvas=canvas, halted=mask)
            assert torch.equal(ours.cpu(), canvas)


@pytest.mark.parametrize(("dim", "classes"), [(1024, 150), (384, 19), (100, 1), (768, 256), (257, 300)])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_exit_head_equals_the_reference(dtype, dim, classes):
    layout = make_layout(2)
    threshold = 0.2 if classes > 100 else 0.5
    inputs = head_inputs(layout.capacity, layout.num_tokens, dim, classes, dtype)
    on_gpu, layout_gpu = [x.cuda() for x in inputs], layout.to("cuda")
    canvas = torch.full((2, 64, 64, classes), 7.0, dtype=dtype).permute(0, 3, 1, 2)
    canvas_gpu, wide_canvas = canvas.cuda(), canvas.double()
    with matmuls_in("ieee"):
        ours = without_sync(sk.exit_head, *on_gpu, layout_gpu, threshold, canvas=canvas_gpu)
    mask = ours.halted.cpu()
    plain = reference(sk.exit_head, *inputs, layout, threshold, canvas=canvas, halted=mask)
    wide = double(inputs)
    truth = reference(sk.exit_head, *wide, layout, threshold, canvas=wide_canvas, halted=mask)
    free = reference(sk.exit_head, *wide, layout, threshold)
    error_rule(ours.confidence.cpu(), plain.confidence, truth.confidence)
    clear = (free.confidence - threshold).abs() > MARGIN[dtype]
    assert torch.equal(mask[clear], free.halted[clear]) and (classes == 1 or clear.any())
    sure = free.confidence > 0.6
    assert torch.equal(ours.labels.cpu()[sure], free.labels[sure])
    same_decisions(ours, plain, labels=False)
    written = (canvas_gpu.cpu() != 7) & (canvas != 7) & (wide_canvas != 7)
    assert written.any() == ours.halted.any()
    error_rule(canvas_gpu.cpu()[written], canvas[written], wide_canvas[written])


def stages(layout: sk.SupertokenLayout) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Both kinds of exit as functions of buffers on the GPU, with context and canvas."""
    tokens, weight = rows_of(layout, 384, torch.bfloat16).cuda(), torch.randn(150, 384).bfloat16().cuda() / 8
    scores, on_gpu = rows_of(layout, 150, torch.bfloat16).cuda(), layout.to("cuda")

    def finish(halting: sk.Halting) -> tuple[Tensor, ...]:
        packed = sk.gather_tokens(tokens, halting)
        layout = halting.layout
        return halting.halted, halting.confidence, layout.cells, layout.cu_seqlens, halting.canvas, packed

    def canvas() -> Tensor:
        shape = layout.batch_size, *layout.grid, 150
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)

    def halt() -> tuple[Tensor, ...]:
        return finish(sk.halt_tokens(scores, on_gpu, 0.3, keep_per_class=2, canvas=canvas()))

    def head() -> tuple[Tensor, ...]:
        return finish(sk.exit_head(tokens, None, None, weight, None, on_gpu, 0.3, keep_per_class=2, canvas=canvas()))

    halt.buffers, head.buffers = [scores], [tokens, weight]  # type: ignore[attr-defined]
    return {"halt_tokens": halt, "exit_head": head}


def bits(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """NaN equals NaN here."""
    return [x.clone().nan_to_num(-77.0) if x.is_floating_point() else x.clone() for x in tensors]


@pytest.mark.parametrize("op", ["halt_tokens", "exit_head"])
def test_ten_runs_give_the_same_bits(op):
    stage = stages(make_layout(4))[op]
    ten_runs_are_identical(lambda: bits(stage()))


@pytest.mark.parametrize("op", ["halt_tokens", "exit_head"])
def test_a_captured_stage_replays_on_new_inputs(op):
    stage = stages(make_layout(2))[op]
    replay = capture(stage)
    for _ in range(3):
        for buffer in stage.buffers:
            buffer.normal_(std=0.5 if op == "exit_head" else 3.0)
        identical(bits(replay()), bits(stage()))


def test_many_tiny_images():
    layout = sk.SupertokenLayout.uniform(1000, (2, 2), num_prefix=1)
    scores = rows_of(layout, 5, torch.float32)
    ours = sk.halt_tokens(scores.cuda(), layout.to("cuda"), 0.8, keep_per_class=1)
    same_decisions(ours, reference(sk.halt_tokens, scores, layout, 0.8, halted=ours.halted.cpu()))


def test_two_million_tokens():
    """Thousands of counts for every program to sum."""
    layout = sk.SupertokenLayout.uniform(2, (1024, 1024), num_prefix=1)
    scores = torch.randint(0, 17, (layout.capacity, 2)).float() / 16
    ours = sk.halt_tokens(scores.cuda(), layout.to("cuda"), 0.7, activation=None)
    same_decisions(ours, reference(sk.halt_tokens, scores, layout, 0.7, activation=None))


def test_more_than_two_to_the_thirty_one_elements():
    """Scores, tokens and canvas of 2^31 elements and more, in 16 bits."""
    classes = 2100
    needs_memory(3 * 2 * classes * 1024 * 1024 / 2**30 + 2)
    layout = sk.SupertokenLayout.uniform(1, (1024, 1024), device="cuda")
    scores = torch.zeros(layout.capacity, classes, dtype=torch.bfloat16, device="cuda")
    last = layout.capacity - 1
    scores[last, 7], scores[5, 3] = 30.0, 30.0
    canvas = torch.ones(1, classes, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    halting = sk.halt_tokens(scores, layout, 0.5, canvas=canvas)
    assert halting.halted.nonzero().flatten().tolist() == [5, last]
    assert halting.labels[last] == 7 and halting.rows[last - 2] == last - 1
    assert torch.equal(canvas[0, :, -1, -1], scores[last]) and torch.equal(canvas[0, :, 0, 5], scores[5])
    assert canvas[0, :, -1, -2].eq(1).all()
    del canvas
    scores[last - 1] = 3.0
    packed = sk.gather_tokens(scores, halting)
    assert packed[last - 2].eq(3).all() and not packed[last - 1 :].any()
