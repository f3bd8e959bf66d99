"""ragged_attention and attention_schedule as kernels, forward and backward, through pointers and through descriptors."""

import itertools
import math

import pytest
import torch
from attention_cases import DTYPES, Case, assert_identical, assert_within_the_rule, make_case
from interpreter import supervision
from tensors import ROW_VIEWS, error_rule, swapped
from torch.library import opcheck

import step_kernels as sk
from step_kernels.triton import attention, attention_schedule, configs

FORWARD = ["attention_forward_kernel"]
BACKWARD = ["attention_delta_kernel", "attention_grad_kv_kernel", "attention_grad_q_kernel"]
ROUTES = {"pointers": 80, "descriptors": 90}
LENGTHS = (0, 1, 2, 3, 17, 63, 65)


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED_ARCHITECTURE", ROUTES[request.param])
    return request.param


@pytest.fixture
def blocks(monkeypatch):
    """Set the rows of a program's tile and of a step: small, so that loops take several steps."""

    def force(own: int, step: int) -> None:
        monkeypatch.setattr(configs, "blocks", lambda *_: configs.Blocks(own, step, 4, 2))

    force(128, 32)
    return force


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(dtype, route, blocks, kernels):
    case = make_case(LENGTHS, 1, 16, dtype)
    found = case.run()
    assert kernels == FORWARD + BACKWARD
    assert_within_the_rule(case, found)


def test_program_order_does_not_matter(route, blocks):
    case = make_case((17, 0, 40), 2, 16, torch.float32, spare=150)
    expected = case.run(scheduled=True)
    supervision.shuffle_programs(1)
    assert_identical(case.run(scheduled=True), expected)


def test_the_blocks_of_the_table(route):
    case = make_case((127, 0, 197), 1, 64, torch.bfloat16)
    assert_within_the_rule(case, case.run())


def test_tiles_lower_than_a_schedules(route, blocks):
    blocks(32, 64)
    case = make_case((130, 0, 17), 1, 8, torch.float32, spare=20)
    found = case.run()
    assert_within_the_rule(case, found)
    assert_identical(case.run(scheduled=True), found)


@pytest.mark.parametrize("dim", (1, 5, 16, 24, 40, 72, 80, 88, 96, 128, 192, 256))
def test_head_dimensions(dim, blocks):
    case = make_case((17, 3), 2, dim, torch.float16)
    assert_within_the_rule(case, case.run())


def test_a_head_is_held_in_two_powers_of_two(kernels):
    for dim in range(1, 257):
        first, rest = configs.split_head_dim(dim)
        assert dim <= first + rest <= 256 and first >= 16 and first & (first - 1) == 0
        assert rest == 0 or (16 <= rest < first and rest & (rest - 1) == 0)
        assert dim < 64 or (first + rest) / dim < 4 / 3
    paid = {dim: sum(configs.split_head_dim(dim)) for dim in (64, 72, 80, 88, 96, 128)}
    assert paid == {64: 64, 72: 80, 80: 80, 88: 96, 96: 96, 128: 128}
    kernels.append("arithmetic on the host")


@pytest.mark.parametrize("dim", (72, 88, 96))
def test_head_dimensions_in_two_parts_through_pointers(dim, blocks, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED_ARCHITECTURE", 80)
    case = make_case((17, 3), 2, dim, torch.float16)
    assert_within_the_rule(case, case.run())


@pytest.mark.parametrize("heads", (1, 3, 16, 25))
def test_numbers_of_heads(heads, blocks):
    case = make_case((5,), heads, 8, torch.float32, spare=0)
    assert_within_the_rule(case, case.run())


@pytest.mark.parametrize("lengths", ((), (0, 0, 0), (1,), (0, 5, 0, 0, 3, 0)))
@pytest.mark.parametrize("spare", (0, 300))
def test_empty_images_and_tails(lengths, spare, route, blocks, kernels):
    blocks(64, 16)
    case = make_case(lengths, 1, 8, torch.float32, spare=spare)
    assert_within_the_rule(case, case.run())
    assert kernels == (FORWARD + BACKWARD if sum(lengths) + spare else [])
    assert_within_the_rule(case, case.run(scheduled=True))
    kernels.append("without rows there is nothing to launch")


def test_more_images_than_are_counted_at_a_time(monkeypatch, blocks):
    monkeypatch.setattr(attention, "IMAGES", 4)
    case = make_case((3, 0, 1, 2, 5, 1, 0, 0, 0, 7), 1, 8, torch.float32)
    assert_within_the_rule(case, case.run())


def test_an_undefined_tail_is_not_written(route, blocks, monkeypatch):
    """Outputs start as NaN here; rows past the live count still hold it afterwards."""
    case = make_case((5, 0, 12), 2, 16, torch.float32, spare=150)
    expected = case.run()[0]
    torch.use_deterministic_algorithms(True)
    try:
        out = case.run(tail="undefined")[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out[:17], expected[:17]) and out[17:].isnan().all()


@pytest.mark.parametrize("where", ("tail", "another image"))
def test_nan_elsewhere_does_not_leak(where, route, blocks):
    """Descriptors load rows past an image's end: its neighbour's, or what the tail holds."""
    case = make_case((17, 40, 5), 1, 16, torch.bfloat16, spare=64)
    clean = case.run()
    rows = slice(17, 57) if where == "another image" else slice(62, None)
    spoilt = [x.detach().clone() for x in (*case.qkv, case.cotangent)]
    for x in spoilt:
        x[rows] = math.nan
    dirty = Case(case.lengths, [x.requires_grad_() for x in spoilt[:3]], spoilt[3])
    for ours, theirs in zip(dirty.run(), clean, strict=True):
        assert torch.equal(ours[:17], theirs[:17]) and torch.equal(ours[57:62], theirs[57:62])


def test_a_nan_score_makes_its_row_nan(route, blocks):
    case = make_case((20, 40), 2, 16, torch.float32)
    clean = case.run()[0]
    q, k, _ = (x.data for x in case.qkv)
    for value in (math.nan, math.inf):
        q[1, 0, 2] = value
        out = case.run()[0]
        assert out[1, 0].isnan().all() and torch.equal(out[1, 1], clean[1, 1])
        assert torch.equal(out[2:], clean[2:]) and torch.equal(out[0], clean[0])
    k[50, 1, 0] = math.nan
    out = case.run()[0]
    assert out[20:60, 1].isnan().all() and torch.equal(out[20:, 0], clean[20:, 0])


def test_half_precision_scores_do_not_overflow(route, blocks):
    """q . k reaches 2.6e6 here, forty times what fp16 holds."""
    case = make_case((6, 40), 1, 64, torch.float16)
    for x in case.qkv[:2]:
        x.data += 200
    found = case.run()
    assert found[0].isfinite().all()
    assert_within_the_rule(case, found)


@pytest.mark.parametrize("scale", (-0.7, 0.0, 3.0))
def test_scales(scale, route, blocks):
    case = make_case((17, 40), 1, 16, torch.float32, scale=scale)
    assert_within_the_rule(case, case.run())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_key_bias(dtype, route, blocks):
    case = make_case((17, 0, 40), 2, 16, dtype, biased=True, scale=-0.3)
    assert_within_the_rule(case, case.run(scheduled=True))


def test_key_bias_of_another_dtype_and_stride(blocks):
    case = make_case((17, 40), 1, 16, torch.float32, biased=True)
    case.bias = torch.stack([case.bias, case.bias], 1).bfloat16()[:, 1]
    assert_within_the_rule(case, case.run())


def reference_run(case: Case) -> list[torch.Tensor]:
    with sk.use_backend("reference"):
        return case.run()


def test_keys_biased_to_minus_infinity(route, blocks):
    """Whole first block of keys: weight zero, not NaN. All keys of an image: zeros, as SDPA has it, and no gradient."""
    case = make_case((70, 5), 1, 16, torch.float32, biased=True)
    case.bias[:40] = -math.inf
    found = case.run()
    assert_within_the_rule(case, found)
    assert not found[2][:40].any() and not found[3][:40].any()
    case.bias[:] = -math.inf
    assert not any(found.any() for found in case.run())
    assert not any(found.any() for found in reference_run(case))


@pytest.mark.parametrize("which", [1, 2])
def test_a_key_that_nobody_weighs_may_hold_infinity(which, blocks):
    """In k: its score is -inf. In v: its weight is zero by its bias. Also where the last block of queries is not full."""
    case = make_case((21,), 1, 16, torch.float32, biased=True)
    q, k, v = (x.data for x in case.qkv)
    q[:21] = q[:21].abs() + 0.1
    if which == 1:
        k[5] = -math.inf
    else:
        case.bias[5] = -math.inf
        v[5, :, 0] = 1e38  # finite, as 0 * inf is NaN for PyTorch, too
    for found, expected in zip(case.run(), reference_run(case), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())


def test_a_finite_score_after_a_block_of_minus_infinity(blocks):
    """Scores that overflow to -inf have weight zero while another key's score is finite."""
    case = make_case((40,), 1, 16, torch.float32)
    q, k, v = (x.data for x in case.qkv)
    q[:40], k[:40] = 1e20, -1e20
    k[35] = 0
    out = case.run()[0]
    assert torch.equal(out[:40], v[35].expand(40, 1, 16))


VIEWS = {
    **ROW_VIEWS,
    "heads_first": swapped,
    "shared_by_heads": lambda x: x[:, :1].expand_as(x),
    "one_row": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, blocks):
    """Each of q, k, v and the incoming gradient with strides of its own: the same bits as without."""
    tensors = torch.randn(4, 22, 2, 16)
    for strided in ((0, 1, 2, 3), (1, 3)):
        views = [VIEWS[view](x) if i in strided else x for i, x in enumerate(tensors)]
        packed = [x.clone(memory_format=torch.contiguous_format) for x in views]
        cases = [Case((17, 5), [x.detach().requires_grad_() for x in four[:3]], four[3]) for four in (views, packed)]
        assert_identical(cases[0].run(), cases[1].run())


def test_a_gradient_without_strides(blocks):
    """What ``sum`` passes back: one number expanded over everything."""
    case = make_case((17, 5), 2, 16, torch.float32, spare=0)
    case.cotangent = torch.tensor(1.5).expand(22, 2, 16)
    assert_within_the_rule(case, case.run())


def test_descriptors_are_for_aligned_rows(kernels):
    qkv = torch.zeros(5, 3, 2, 72, dtype=torch.float16)
    assert all(attention._describable(x) for x in qkv.unbind(1))
    assert attention._describable(qkv[:, 0, :1])
    odd = torch.zeros(5 * 3 * 2 * 72 + 1, dtype=torch.float16)[1:].view_as(qkv)
    for x in (
        odd[:, 0],
        torch.zeros(5, 2, 12, dtype=torch.float16),
        qkv[:, 0, :1].expand(-1, 2, -1),
        qkv[:1, 0].expand(5, -1, -1),
        qkv[:, 0].transpose(0, 1),
    ):
        assert not attention._describable(x)
    kernels.append("a decision on the host")


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same values in rows 2^30 elements apart; memory that nobody touches costs nothing."""
    stride = 2**30 + 8
    rows, heads, dim = values.shape
    far = torch.empty((rows - 1) * stride + heads * dim, dtype=values.dtype).as_strided(values.shape, (stride, dim, 1))
    far.copy_(values.detach())
    return far.requires_grad_()


def test_rows_further_apart_than_32_bits_count(route, blocks):
    case = make_case((3,), 2, 16, torch.bfloat16, spare=0)
    far = Case((3,), [far_apart(x) for x in case.qkv], far_apart(case.cotangent).detach())
    out = sk.ragged_attention(*far.qkv, far.cu_seqlens, 3)
    q, k, v = (x.detach() for x in far.qkv)
    lse = torch.ops.step_kernels.ragged_attention(q, k, v, far.cu_seqlens, 3, None, None, None, True, True)[1]
    arguments = (far.cotangent, q, k, v, out.detach(), lse, far.cu_seqlens, None, None, None)
    assert_identical([out, *torch.ops.step_kernels.ragged_attention_backward(*arguments)], case.run())


def test_results_of_more_elements_than_32_bits_count(route, blocks, monkeypatch):
    """65 rows of 2^17 heads of 256 make 2^31 elements. Programs run for the first head only: the others' memory is never touched."""
    one = make_case((65,), 1, 256, torch.bfloat16, spare=0)
    expected = one.run()
    monkeypatch.setattr(attention._Launch, "grid", lambda self, cu_seqlens: (1,))
    q, k, v, cotangent = (x.detach().expand(65, 2**17, 256) for x in (*one.qkv, one.cotangent))
    arguments = (q, k, v, one.cu_seqlens, 65, None, None, None, True, False)
    out, lse = attention.ragged_attention(*arguments)
    assert out.numel() > 2**31
    row_sums = (out[:, 0].float() * one.cotangent[:, 0].float()).sum(1)
    monkeypatch.setattr(attention, "_delta", lambda delta, *_: delta[0].copy_(row_sums))
    found = attention.ragged_attention_backward(cotangent, q, k, v, out, lse, one.cu_seqlens, None, None, None)
    assert_identical([x[:, :1] for x in (out, *found)], expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_mates_do_not_matter(dtype, route, blocks):
    case = make_case((17, 0, 65, 1), 2, 16, dtype, spare=0)
    together = case.run()
    for start, stop in itertools.pairwise(case.cu_seqlens.tolist()):
        one = [x.detach()[start:stop].clone() for x in (*case.qkv, case.cotangent)]
        alone = Case((stop - start,), [x.requires_grad_() for x in one[:3]], one[3])
        if stop > start:
            assert_identical(alone.run(), [x[start:stop] for x in together])


def test_an_overestimated_max_seqlen_changes_nothing(blocks):
    case = make_case((17, 5), 1, 16, torch.float32)
    assert_identical(case.run(max_seqlen=4000), case.run())


def test_inference_saves_no_log_sum_exp(blocks, monkeypatch, kernels):
    saved = []
    launch = attention.ragged_attention
    monkeypatch.setattr(attention, "ragged_attention", lambda *args: saved.append(args[8]) or launch(*args))
    case = make_case((17, 5), 1, 16, torch.float32)
    q, k, v = case.qkv
    sk.ragged_attention(q.detach(), k.detach(), v.detach(), case.cu_seqlens, 17)
    with torch.no_grad():
        sk.ragged_attention(q, k, v, case.cu_seqlens, 17)
    sk.ragged_attention(q.detach(), k, v, case.cu_seqlens, 17)
    assert saved == [False, False, True] and kernels == 3 * FORWARD


def test_log_sum_exp(route, blocks):
    case = make_case((17, 0, 40), 3, 16, torch.float32, biased=True, spare=200)
    arguments = (case.cu_seqlens, 40, 0.3, case.bias, None, True, True)
    qkv = [x.detach() for x in case.qkv]
    op = torch.ops.step_kernels.ragged_attention
    ours = op(*qkv, *arguments)[1]
    with sk.use_backend("reference"):
        plain, truth = op(*qkv, *arguments)[1], op(*(x.double() for x in qkv), *arguments)[1]
    assert ours.shape == (3, 257) and ours.dtype == torch.float32 and not ours[:, 57:].any()
    error_rule(ours, plain, truth)


def test_a_backward_pass_without_a_saved_log_sum_exp(blocks, kernels):
    case = make_case((17, 5), 1, 16, torch.float32)
    expected = case.run()
    kernels.clear()
    op = torch.ops.step_kernels.ragged_attention
    out, lse = op(*case.qkv, case.cu_seqlens, 17, None, None, None, False, True)
    assert lse.shape == (0,)
    assert_identical([out, *torch.autograd.grad(out, case.qkv, case.cotangent)], expected)
    assert kernels == FORWARD + FORWARD + BACKWARD


@pytest.mark.parametrize(
    "lengths", ((), (0,), (0, 0), (1,), (128,), (129, 0, 128), (5, 300, 5, 300, 1, 0), (1,) * 5, (400, 2, 500))
)
@pytest.mark.parametrize(("spare", "block"), ((0, 2), (1, 256), (1000, 2)))
def test_schedule(lengths, spare, block, monkeypatch, kernels):
    monkeypatch.setattr(attention_schedule, "BLOCK", block)
    cu_seqlens = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)
    supervision.shuffle_programs(block)
    ours = sk.attention_schedule(cu_seqlens, sum(lengths) + spare)
    with sk.use_backend("reference"):
        assert torch.equal(ours, sk.attention_schedule(cu_seqlens, sum(lengths) + spare))
    assert kernels == (["attention_schedule_kernel"] if len(lengths) + sum(lengths) + spare else [])
    kernels.append("a schedule without entries needs no kernel")


def test_a_schedule_of_more_rows_stays_in_memory(route, blocks):
    """Its result is wrong, but every load and store lies inside an argument: the harness checks."""
    case = make_case((17,), 1, 16, torch.float32, spare=0)
    schedule = sk.attention_schedule(torch.tensor([0, 100], dtype=torch.int32), 100)
    out = sk.ragged_attention(*case.qkv, case.cu_seqlens, 17, schedule=schedule)
    torch.autograd.grad(out, case.qkv, case.cotangent)


def test_opcheck(blocks):
    case = make_case((9, 4), 1, 8, torch.float32)
    cu_seqlens = case.cu_seqlens
    schedule = sk.attention_schedule(cu_seqlens, 16)
    opcheck(torch.ops.step_kernels.attention_schedule.default, (cu_seqlens, 16))
    for options in ((None, None, None, True), (0.3, torch.randn(16), schedule, True)):
        opcheck(torch.ops.step_kernels.ragged_attention.default, (*case.qkv, cu_seqlens, 9, *options, True))
    qkv = [x.detach() for x in case.qkv]
    out, lse = torch.ops.step_kernels.ragged_attention(*qkv, cu_seqlens, 9, None, None, None, True, True)
    arguments = (swapped(case.cotangent), *qkv, out, lse, cu_seqlens, None, None, schedule)
    opcheck(torch.ops.step_kernels.ragged_attention_backward.default, arguments)


def test_compiles(blocks):
    case = make_case((17, 5), 2, 16, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v, cu_seqlens):
        schedule = sk.attention_schedule(cu_seqlens, q.shape[0])
        return sk.ragged_attention(q, k, v, cu_seqlens, 17, schedule=schedule)

    out = attend(*case.qkv, case.cu_seqlens)
    assert_identical([out, *torch.autograd.grad(out, case.qkv, case.cotangent)], case.run())


def test_double_backward_is_refused(blocks):
    case = make_case((17, 5), 1, 16, torch.float32, spare=0)
    out = sk.ragged_attention(*case.qkv, case.cu_seqlens, 17)
    (gradient,) = torch.autograd.grad(out.square().sum(), case.qkv[:1], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="double backward"):
        torch.autograd.grad(gradient.sum(), case.qkv[:1])
