"""exit_head as kernels: the decisions of the fp64 reference, log-probabilities within twice plain PyTorch's error."""

import pytest
import torch
from cases.halting import head_inputs, same_decisions
from floors import double, reference
from interpreter import supervision
from layouts import AWKWARD, PlainLayout, build
from tensors import IMAGE_VIEWS, LOW_PRECISION, ROW_VIEWS, error_rule, one_ulp, wide_rows
from torch import Tensor

import step_kernels as sk
from step_kernels.triton.common import launch
from step_kernels.triton.halting import compaction, decision, head

NAN, INF = float("nan"), float("inf")
MARGIN = {
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}  # decisions closer to call than this may differ


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles as small as a matmul may have."""
    monkeypatch.setattr(head, "HEAD_CLASSES", 16)
    monkeypatch.setattr(head, "HEAD_TILES", dict.fromkeys(head.HEAD_TILES, (16, 16)))
    monkeypatch.setattr(head, "row_of", head.row_of.__wrapped__)  # which remembers rows of the tiles before
    monkeypatch.setattr(decision, "KEEP_ROWS", 8)
    monkeypatch.setattr(compaction, "COMPACT_ROWS", ((16, 16, 4),))


def accurate(result: Tensor, plain: Tensor, truth: Tensor, usual: float) -> None:
    """error_rule; but of a few numbers plain PyTorch may be right to the last bit by luck, so there its ``usual`` error counts."""
    if result.numel() >= 64:
        return error_rule(result, plain, truth)
    if result.numel():
        ours, theirs = ((x.double() - truth.double()).abs().max() for x in (result, plain))
        ulp = one_ulp(float(truth.double().abs().max()), result.dtype)
        assert ours <= 2 * max(float(theirs), usual) + ulp


def usual_errors(inputs: list[Tensor | None], kind: torch.dtype | None) -> tuple[float, float]:
    """Plain PyTorch's errors of confidence and canvas with this head, on 256 tokens."""
    layout = sk.SupertokenLayout.uniform(1, (16, 16))
    dtype, dim, classes = inputs[0].dtype, inputs[0].shape[1], inputs[3].shape[0]
    some = [(2 * torch.randn(256, dim) + 0.5).to(dtype), *inputs[1:]]
    canvas = torch.zeros(1, classes, 16, 16, dtype=kind or torch.float32)
    exact = canvas.double()
    wide = double(some)
    everyone = {"halted": torch.ones(256, dtype=torch.bool)}
    plain = reference(sk.exit_head, *some, layout, 0.5, canvas=canvas, **everyone)
    truth = reference(sk.exit_head, *wide, layout, 0.5, canvas=exact, **everyone)
    return tuple(
        float((a.double() - b).abs().max()) for a, b in ((plain.confidence, truth.confidence), (canvas, exact))
    )


def compare(inputs: list[Tensor | None], layout: sk.SupertokenLayout, threshold, canvas=None, **options) -> sk.Halting:
    """Our result, after confidence, canvas, labels and decisions were found right."""
    dtype = inputs[0].dtype
    wide = double(inputs)
    canvases = [None if canvas is None else canvas.clone().to(kind) for kind in (canvas_dtype(canvas), torch.float64)]
    ours = sk.exit_head(*inputs, layout, threshold, canvas=canvas, **options)
    # At equal decisions the same cells are written; ours are free, the others' are replayed.
    replayed = {**options, "halted": ours.halted}
    plain = reference(sk.exit_head, *inputs, layout, threshold, canvas=canvases[0], **replayed)
    truth = reference(sk.exit_head, *wide, layout, threshold, canvas=canvases[1], **replayed)
    usual_confidence, usual_canvas = usual_errors(inputs, canvas_dtype(canvas))
    accurate(ours.confidence, plain.confidence, truth.confidence, usual_confidence)
    free = reference(sk.exit_head, *wide, layout, threshold, **options)
    if isinstance(threshold, Tensor):
        threshold = threshold.item()
    clear = (free.confidence - threshold).abs() > MARGIN[dtype]
    if not options.get("keep_per_class"):  # one token's margin is not enough where tokens are ranked
        assert torch.equal(ours.halted[clear], free.halted[clear])
    assert torch.equal(ours.labels[clear & (free.confidence > 0.6)], free.labels[clear & (free.confidence > 0.6)])
    assert torch.equal(ours.labels == -1, free.labels == -1)
    same_decisions(ours, plain, labels=False)
    if canvas is not None:
        written = canvases[1] != 7  # canvases start as sevens, which no log-probability is
        surely = written & (canvases[0] != 7)
        accurate(canvas[surely], canvases[0][surely], canvases[1][surely], usual_canvas)
        if not options.get("keep_per_class"):
            assert torch.equal(canvas != 7, written)
    return ours


def canvas_dtype(canvas: Tensor | None) -> torch.dtype | None:
    return None if canvas is None else canvas.dtype


def sevens(layout: sk.SupertokenLayout, classes: int, dtype: torch.dtype) -> Tensor:
    return torch.full((layout.batch_size, classes, *layout.grid), 7.0, dtype=dtype)


@pytest.mark.parametrize(("spare", "seed", "keep"), [(3, 1, 0), (None, 2, 2)])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_layouts(name, spare, seed, keep, kernels):
    supervision.shuffle_programs(seed)
    plain = AWKWARD[name]
    layout = build(plain, spare)
    inputs = head_inputs(layout.capacity, len(plain.tokens()), 24, 5, torch.float32)
    kernels.clear()
    compare(inputs, layout, 0.5, sevens(layout, 5, torch.float32), keep_per_class=keep)
    expected = ["head_kernel", "keep_kernel", "compact_kernel"] if keep else ["head_kernel", "compact_kernel"]
    assert kernels == (expected if layout.capacity else [])
    if not layout.capacity:
        kernels.append("no rows need no kernel")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("dim", "classes"), [(1, 2), (40, 1), (96, 19), (130, 150), (64, 300)])
def test_sizes(dim, classes, dtype):
    layout = sk.SupertokenLayout.uniform(2, (10, 16), side=2)
    inputs = head_inputs(80, 80, dim, classes, dtype)
    halting = compare(inputs, layout, 0.4 if classes < 100 else 0.2, sevens(layout, classes, dtype))
    assert halting.halted.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("classes", "keep"), [(5, 0), (20, 1), (40, 0), (70, 1)])
def test_many_tiles_of_everything(dtype, classes, keep, small_blocks):
    supervision.shuffle_programs(classes)
    plain = AWKWARD["prefix_5"]
    layout = build(plain, 20)
    inputs = head_inputs(layout.capacity, len(plain.tokens()), 37, classes, dtype)
    compare(inputs, layout, 0.3, sevens(layout, classes, torch.float32), keep_per_class=keep)


@pytest.mark.parametrize("missing", [[1], [2], [4], [1, 2, 4]])
def test_parameters_that_are_none(missing):
    plain = AWKWARD["ragged_3x5"]
    layout = build(plain, 3)
    inputs = head_inputs(layout.capacity, len(plain.tokens()), 24, 5, torch.float32)
    inputs = [None if index in missing else x for index, x in enumerate(inputs)]
    compare(inputs, layout, torch.tensor(0.6, dtype=torch.float64), sevens(layout, 5, torch.float32))


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_strides_of_inputs(view):
    plain = AWKWARD["ragged_3x5"]
    layout = build(plain, 3)
    tokens, *parameters = head_inputs(layout.capacity, len(plain.tokens()), 24, 5, torch.float32)
    parameters = [wide_rows(x[:, None])[:, 0] if x.ndim == 1 else x.T.contiguous().T for x in parameters]
    assert all(x.stride(-1) != 1 for x in parameters)
    mask = torch.rand(layout.capacity, 2).lt(0.4)[:, 1]
    compare([ROW_VIEWS[view](tokens), *parameters], layout, 0.6, sevens(layout, 5, torch.float32), halted=mask)


@pytest.mark.parametrize(("view", "dtype"), list(zip(IMAGE_VIEWS, [*LOW_PRECISION, torch.bfloat16], strict=True)))
def test_canvas_of_any_strides_and_dtype(view, dtype):
    plain = AWKWARD["prefix_5"]
    layout = build(plain)
    inputs = head_inputs(layout.capacity, layout.capacity, 24, 20, torch.bfloat16)
    canvas = IMAGE_VIEWS[view](sevens(layout, 20, dtype))
    assert compare(inputs, layout, 0.3, canvas).halted.any()


def test_layer_norm_far_from_zero():
    """A mean of a thousand deviations: a variance of sums of squares would lose every digit."""
    layout = sk.SupertokenLayout.uniform(1, (5, 16))
    inputs = head_inputs(80, 80, 96, 7, torch.float32)
    inputs[0] += 2000
    compare(inputs, layout, 0.4, sevens(layout, 7, torch.float32))


@pytest.mark.parametrize("forced", [False, True])
def test_rows_that_are_no_numbers(forced):
    layout = sk.SupertokenLayout.uniform(1, (2, 4))
    inputs = head_inputs(8, 8, 20, 5, torch.float32)
    inputs[0][1, 2], inputs[0][2, 0], inputs[0][3, 3] = NAN, INF, -INF
    inputs[0][4] = 3.0  # no variance
    mask = torch.arange(8) % 2 == 1 if forced else None
    for bias, eps in [(0.0, 1e-6), (-INF, 1e-6), (INF, 1e-6), (NAN, 1e-6), (0.0, 0.0)]:
        inputs[4][2] = bias
        ours, theirs = sevens(layout, 5, torch.float32), sevens(layout, 5, torch.float32)
        a = sk.exit_head(*inputs, layout, 0.4, eps=eps, canvas=ours, halted=mask)
        b = reference(sk.exit_head, *inputs, layout, 0.4, eps=eps, canvas=theirs, halted=mask)
        assert torch.equal(a.halted, b.halted) and torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.confidence, b.confidence, equal_nan=True, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert torch.equal(a.labels == -1, a.confidence.isnan())


def test_logits_that_fp16_cannot_hold():
    """Sums stay in fp32: what plain PyTorch rounds to inf, and so to NaN, has a definite class."""
    layout = sk.SupertokenLayout.uniform(1, (4, 4))
    inputs = [x.half() for x in head_inputs(16, 16, 64, 3, torch.float32)]
    inputs[3] *= 20000
    halting = sk.exit_head(*inputs, layout, 0.5, canvas=(canvas := sevens(layout, 3, torch.float16)))
    truth = reference(sk.exit_head, *(x.double() for x in inputs), layout, 0.5)
    assert torch.equal(halting.labels, truth.labels) and halting.halted.all()
    assert not canvas.isnan().any() and canvas.isneginf().any()


def test_rows_beyond_two_to_the_thirty_one():
    """Row 3 of tokens and weights, cell (1, 1) of the canvas: 3 * 2^30 elements in. Only the pages that are touched exist."""
    layout = build(PlainLayout((((0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)),), (2, 2)))
    near = head_inputs(4, 4, 16, 4, torch.bfloat16)
    far = list(near)
    for index in (0, 3):
        storage = torch.empty(3 * 2**30 + 16, dtype=torch.bfloat16)
        far[index] = storage.as_strided((4, 16), (2**30, 1)).copy_(near[index])
    canvas = torch.empty(3 * 2**30 + 4, dtype=torch.bfloat16).as_strided((1, 4, 2, 2), (1, 1, 2**31, 2**30))
    everything = torch.ones(4, dtype=torch.bool)
    expected = sevens(layout, 4, torch.bfloat16)
    sk.exit_head(*far, layout, 0.5, canvas=canvas, halted=everything)
    sk.exit_head(*near, layout, 0.5, canvas=expected, halted=everything)
    assert torch.equal(canvas, expected)


@pytest.mark.parametrize("keep", [0, 2])
def test_replay(keep, kernels):
    plain = AWKWARD["prefix_5"]
    layout = build(plain, 3)
    inputs = head_inputs(layout.capacity, len(plain.tokens()), 24, 5, torch.float32)
    mask = torch.rand(layout.capacity) < 0.5
    kernels.clear()
    halting = compare(inputs, layout, 0.6, sevens(layout, 5, torch.float32), halted=mask, keep_per_class=keep)
    assert kernels == ["head_kernel", "compact_kernel"]
    assert torch.equal(halting.halted, mask & (layout.cells[:, 3] > 0))


def test_batch_mates_do_not_matter():
    plain = AWKWARD["ragged_3x5"]
    inputs = head_inputs(len(plain.tokens()), len(plain.tokens()), 24, 5, torch.float32)
    together = sk.exit_head(*inputs, build(plain), 0.5)
    starts = plain.cu_seqlens()
    for index, blocks in enumerate(plain.images):
        rows = slice(starts[index], starts[index + 1])
        alone = sk.exit_head(inputs[0][rows], *inputs[1:], build(PlainLayout((blocks,), plain.grid)), 0.5)
        assert torch.equal(alone.confidence, together.confidence[rows])


def test_precision_of_fp32_follows_torch():
    """Also where it was set through torch's newer interface, after which the older one raises."""
    q = torch.randn(5, 1, 16, dtype=torch.bfloat16)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")]:
            torch.backends.cuda.matmul.fp32_precision = setting
            assert (
                launch.input_precision(torch.float32) == expected and launch.input_precision(torch.bfloat16) == "ieee"
            )
            assert sk.ragged_attention(q, q, q, torch.tensor([0, 5], dtype=torch.int32), 5).isfinite().all()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
