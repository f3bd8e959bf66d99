"""ragged_attention and attention_schedule as kernels, forward and backward, through pointers and through descriptors."""

import itertools

import pytest
import torch
from cases.attention import assert_within_the_rule, batch_mates_do_not_matter, make_case, of_integers
from interpreter import supervision
from tensors import LOW_PRECISION, error_rule, identical

import step_kernels as sk
from step_kernels.triton.attention import launch as attention
from step_kernels.triton.attention import schedule as attention_schedule
from step_kernels.triton.common import launch
from step_kernels.triton.common.operands import split_head_dim

FORWARD = ["attention_forward_kernel"]
BACKWARD = ["attention_delta_kernel", "attention_grad_kv_kernel", "attention_grad_q_kernel"]
LENGTHS = (0, 1, 2, 17, 32, 33, 63, 65)  # steps of 32 keys: short, even, reaching back over 1 to 31


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_forward_and_backward(dtype, route, blocks, kernels):
    case = make_case(LENGTHS, 1, 16, dtype)
    found = case.run()
    assert kernels == FORWARD + BACKWARD
    assert_within_the_rule(case, found)


def test_program_order_does_not_matter(route, blocks):
    case = make_case((17, 0, 40), 2, 16, torch.float32, spare=150)
    expected = case.run(scheduled=True)
    supervision.shuffle_programs(1)
    identical(case.run(scheduled=True), expected)


@pytest.mark.parametrize("multiprocessors", (1, 4))
def test_the_blocks_of_the_table(multiprocessors, route, monkeypatch):
    """Those for few programs, too: here are 6."""
    monkeypatch.setattr(launch, "MULTIPROCESSORS", multiprocessors)
    case = make_case((127, 0, 197), 1, 64, torch.bfloat16)
    assert_within_the_rule(case, case.run())


def test_tiles_lower_than_a_schedules(route, blocks):
    blocks(32, 64)
    case = make_case((130, 0, 17), 1, 8, torch.float32, spare=20)
    found = case.run()
    assert_within_the_rule(case, found)
    identical(case.run(scheduled=True), found)


@pytest.mark.parametrize("dim", (1, 5, 16, 24, 40, 72, 80, 88, 96, 128, 192, 256))
def test_head_dimensions(dim, blocks):
    case = make_case((17, 3), 2, dim, torch.float16)
    assert_within_the_rule(case, case.run())


def test_a_head_is_held_in_two_powers_of_two(kernels):
    for dim in range(1, 257):
        first, rest = split_head_dim(dim)
        assert dim <= first + rest <= 256 and first >= 16 and first & (first - 1) == 0
        assert rest == 0 or (16 <= rest < first and rest & (rest - 1) == 0)
        assert dim < 64 or (first + rest) / dim < 4 / 3
    paid = {dim: sum(split_head_dim(dim)) for dim in (64, 72, 80, 88, 96, 128)}
    assert paid == {64: 64, 72: 80, 80: 80, 88: 96, 96: 96, 128: 128}
    kernels.append("arithmetic on the host")


@pytest.mark.parametrize("dim", (72, 88, 96))
def test_head_dimensions_in_two_parts_through_pointers(dim, blocks, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED_ARCHITECTURE", 80)
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
    case = case if max(lengths, default=0) > 1 else of_integers(case)
    assert_within_the_rule(case, case.run())
    assert kernels == (FORWARD + BACKWARD if sum(lengths) + spare else [])
    assert_within_the_rule(case, case.run(scheduled=True))
    kernels.append("without rows there is nothing to launch")


def test_more_images_than_are_counted_at_a_time(monkeypatch, blocks):
    monkeypatch.setattr(attention, "IMAGES", 4)
    case = make_case((3, 0, 1, 2, 5, 1, 0, 0, 0, 7), 1, 8, torch.float32)
    assert_within_the_rule(case, case.run())


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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_mates_do_not_matter(dtype, route, blocks):
    batch_mates_do_not_matter(make_case((17, 0, 65, 1), 2, 16, dtype, spare=0))


def test_an_overestimated_max_seqlen_changes_nothing(blocks):
    case = make_case((17, 5), 1, 16, torch.float32)
    identical(case.run(max_seqlen=4000), case.run())


def test_inference_saves_no_log_sum_exp(blocks, monkeypatch, kernels):
    saved = []
    launch = attention.ragged_attention
    route = "step_kernels.triton.attention.ragged_attention"
    monkeypatch.setattr(route, lambda *args: saved.append(args[7]) or launch(*args))
    case = make_case((17, 5), 1, 16, torch.float32)
    q, k, v = case.qkv
    sk.ragged_attention(q.detach(), k.detach(), v.detach(), case.cu_seqlens, 17)
    with torch.no_grad():
        sk.ragged_attention(q, k, v, case.cu_seqlens, 17)
    sk.ragged_attention(q.detach(), k, v, case.cu_seqlens, 17)
    assert saved == [False, False, True] and kernels == 3 * FORWARD


def test_log_sum_exp(route, blocks):
    case = make_case((17, 0, 40), 3, 16, torch.float32, biased=True, spare=200)
    arguments = (case.cu_seqlens, 0.3, case.bias, None, True, True)
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
    out, lse = op(*case.qkv, case.cu_seqlens, None, None, None, False, True)
    assert lse.shape == (0,)
    identical([out, *torch.autograd.grad(out, case.qkv, case.cotangent)], expected)
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


def test_double_backward_is_refused(blocks):
    case = make_case((17, 5), 1, 16, torch.float32, spare=0)
    out = sk.ragged_attention(*case.qkv, case.cu_seqlens, 17)
    (gradient,) = torch.autograd.grad(out.square().sum(), case.qkv[:1], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="double backward"):
        torch.autograd.grad(gradient.sum(), case.qkv[:1])
