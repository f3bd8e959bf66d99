"""ragged_attention as kernels on awkward values, strides and addresses."""

import math

import pytest
import torch
from cases.attention import Case, assert_within_the_rule, case_of, make_case, nan_does_not_leak, overflowing
from floors import reference
from tensors import ROW_VIEWS, identical, new_memory_is_nan, swapped

import step_kernels as sk
from step_kernels.triton.attention import launch as attention
from step_kernels.triton.common.operands import describable


def test_an_undefined_tail_is_not_written(route, blocks, monkeypatch):
    """Outputs start as NaN here; rows past the live count still hold it afterwards."""
    case = make_case((5, 0, 12), 2, 16, torch.float32, spare=150)
    expected = case.run()[0]
    with new_memory_is_nan():
        out = case.run(tail="undefined")[0]
    assert torch.equal(out[:17], expected[:17]) and out[17:].isnan().all()


@pytest.mark.parametrize("where", ("tail", "another image"))
def test_nan_elsewhere_does_not_leak(where, route, blocks):
    """Descriptors load rows past an image's end: its neighbour's, or what the tail holds."""
    case = make_case((17, 40, 5), 1, 16, torch.bfloat16, spare=64)
    nan_does_not_leak(case, slice(17, 57) if where == "another image" else slice(62, None))


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
    case = overflowing(6, 40)
    found = case.run()
    assert found[0].isfinite().all()
    assert_within_the_rule(case, found)


def test_keys_biased_to_minus_infinity(route, blocks):
    """Whole first block of keys: weight zero, not NaN. All keys of an image: zeros, as SDPA has it, and no gradient."""
    case = make_case((70, 5), 1, 16, torch.float32, biased=True)
    case.bias[:40] = -math.inf
    found = case.run()
    assert_within_the_rule(case, found)
    assert not found[2][:40].any() and not found[3][:40].any()
    case.bias[:] = -math.inf
    assert not any(found.any() for found in case.run())
    assert not any(found.any() for found in reference(case.run))


@pytest.mark.parametrize("which", [1, 2])
def test_a_key_that_nobody_weighs_may_hold_infinity(which, route, blocks):
    """In k: its score is -inf. In v: its weight is zero by its bias. Also where the last block of queries is not full, or keys come twice."""
    case = make_case((21, 45), 1, 16, torch.float32, biased=True)
    q, k, v = (x.data for x in case.qkv)
    q[:66] = q[:66].abs() + 0.1
    unweighed = [5, 21 + 20]
    if which == 1:
        k[unweighed] = -math.inf
    else:
        case.bias[unweighed] = -math.inf
        v[unweighed, :, 0] = 1e38  # finite, as 0 * inf is NaN for PyTorch, too
    for found, expected in zip(case.run(), reference(case.run), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("biased", (False, True))
def test_infinite_values_spoil_what_they_spoil_in_pytorch(biased, route, blocks):
    """Sums that hold one are not finite, others are as ever: also where its key comes twice, the second time with weight zero."""
    case = make_case((5, 45), 2, 16, torch.float32, biased=biased)
    clean = case.run()[0]
    case.qkv[2].data[[3, 5 + 20], 1, 7] = torch.tensor([math.inf, -math.inf])
    found, expected = case.run()[0], reference(case.run)[0]
    assert torch.equal(found.isfinite(), expected.isfinite()) and not found[:50, 1, 7].isfinite().any()
    assert torch.equal(found[:, 0], clean[:, 0])


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
        cases = [case_of((17, 5), four) for four in (views, packed)]
        identical(cases[0].run(), cases[1].run())


def test_a_gradient_without_strides(blocks):
    """What ``sum`` passes back: one number expanded over everything."""
    case = make_case((17, 5), 2, 16, torch.float32, spare=0)
    case.cotangent = torch.tensor(1.5).expand(22, 2, 16)
    assert_within_the_rule(case, case.run())


def test_descriptors_are_for_aligned_rows(kernels):
    qkv = torch.zeros(5, 3, 2, 72, dtype=torch.float16)
    assert all(describable(x) for x in qkv.unbind(1))
    assert describable(qkv[:, 0, :1])
    odd = torch.zeros(5 * 3 * 2 * 72 + 1, dtype=torch.float16)[1:].view_as(qkv)
    for x in (
        odd[:, 0],
        torch.zeros(5, 2, 12, dtype=torch.float16),
        qkv[:, 0, :1].expand(-1, 2, -1),
        qkv[:1, 0].expand(5, -1, -1),
        qkv[:, 0].transpose(0, 1),
        torch.zeros(5, 232, dtype=torch.float16).as_strided((5, 2, 72), (232, 80, 1)),  # rows at no multiple of heads
    ):
        assert not describable(x)
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
    lse = torch.ops.step_kernels.ragged_attention(q, k, v, far.cu_seqlens, None, None, None, True, True)[1]
    arguments = (far.cotangent, q, k, v, out.detach(), lse, far.cu_seqlens, None, None, None)
    identical([out, *torch.ops.step_kernels.ragged_attention_backward(*arguments)], case.run())


def test_results_of_more_elements_than_32_bits_count(route, blocks, monkeypatch):
    """65 rows of 2^17 heads of 256 make 2^31 elements. Programs run for the first head only: the others' memory is never touched."""
    one = make_case((65,), 1, 256, torch.bfloat16, spare=0)
    expected = one.run()
    monkeypatch.setattr(attention._Plan, "grid", lambda self, cu_seqlens: (1,))
    q, k, v, cotangent = (x.detach().expand(65, 2**17, 256) for x in (*one.qkv, one.cotangent))
    arguments = (q, k, v, one.cu_seqlens, None, None, None, True, False)
    out, lse = attention.ragged_attention(*arguments)
    assert out.numel() > 2**31
    row_sums = (out[:, 0].float() * one.cotangent[:, 0].float()).sum(1)
    monkeypatch.setattr(attention, "_delta", lambda delta, *_: delta[0].copy_(row_sums))
    found = attention.ragged_attention_backward(cotangent, q, k, v, out, lse, one.cu_seqlens, None, None, None)
    identical([x[:, :1] for x in (out, *found)], expected)
