"""masked_attention as kernels, forward and backward."""

import math

import pytest
import torch
from cases.cross_attention import (
    every_row_finite,
    images_of_masks_do_not_matter_to_each_other,
    masked,
    masked_of,
    masked_within_the_rule,
)
from floors import reference
from interpreter import supervision
from tensors import LOW_PRECISION, error_rule, identical, offset, wide_rows

import step_kernels as sk
from step_kernels.triton import masked_attention

LIST = ["kept_rows_kernel"]
FORWARD = [*LIST, "cross_attention_kernel"]
BACKWARD = ["grad_queries_kernel", "grad_keys_kernel"]
KEYS = ("kept", "all")


@pytest.mark.parametrize("chunk", (16, 1024))
@pytest.mark.parametrize("length", (0, 1, 15, 17, 70))
def test_the_list_of_kept_rows_is_exact(length, chunk, monkeypatch, kernels):
    monkeypatch.setattr(masked_attention, "CHUNK", chunk)
    monkeypatch.setattr(masked_attention, "COUNT", 2 * chunk)
    supervision.shuffle_programs(1)
    keep = torch.rand(4, length) < 0.5
    keep[0], keep[2] = True, False
    for mask in (keep, keep.T.contiguous().T, torch.stack([keep, ~keep], 2)[..., 0], keep[1:2].expand(3, -1)):
        found = torch.ops.step_kernels.kept_rows(mask)
        identical(found, reference(torch.ops.step_kernels.kept_rows, mask))
    assert kernels == 4 * LIST if length else not kernels
    kernels.append("without rows there is nothing to launch")


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_forward_and_backward(dtype, keys, cross_tiles, kernels):
    case = masked(3, 2, 50, 16, dtype, keys=keys)
    found = case.run()
    assert kernels == FORWARD + BACKWARD
    masked_within_the_rule(case, found)
    assert all(x.transpose(1, 2).is_contiguous() for x in found)


@pytest.mark.parametrize("keys", KEYS)
def test_numbers_of_kept_rows(keys, cross_tiles):
    """One image each; q, k and v keep their values in every row, as ``keys="all"`` reads some of them."""
    counts = (0, 1, 2, 3, 17, 63, 65)
    case = every_row_finite(masked(len(counts), 1, 65, 16, torch.float32, keys="all"))
    case.keys = keys
    for keep, count in zip(case.keep, counts, strict=True):
        keep[:] = torch.randperm(65) < count
    masked_within_the_rule(case, case.run())


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("length", (1, 3))
def test_short_images(length, keys, cross_tiles):
    """The gradient of the only key's score is zero: a difference of equal numbers, so no relative error to speak of."""
    case = masked(2, 1, length, 16, torch.float32, keys=keys)
    torch.testing.assert_close(case.run(), reference(case.run), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_blocks_of_the_table(dtype):
    case = masked(1, 1, 127 if dtype == torch.float32 else 197, 64, dtype, share=0.8)
    masked_within_the_rule(case, case.run())


@pytest.mark.parametrize("own, step", ((16, 32), (64, 16), (16, 16)))
def test_other_blocks(own, step, cross_tiles):
    cross_tiles(own, step)
    case = masked(3, 1, 50, 16, torch.float32)
    masked_within_the_rule(case, case.run())


@pytest.mark.parametrize("keys", KEYS)
def test_program_order_does_not_matter(keys, cross_tiles):
    case = masked(3, 1, 40, 16, torch.float32, keys=keys)
    expected = case.run()
    for seed in (1, 2):
        supervision.shuffle_programs(seed)
        identical(case.run(), expected)


@pytest.mark.parametrize("dim", (1, 5, 24, 64, 72, 80, 128, 256))
def test_head_dimensions(dim, cross_tiles):
    case = masked(2, 2, 20, dim, torch.float16)
    masked_within_the_rule(case, case.run())


@pytest.mark.parametrize("heads", (1, 3, 16))
def test_numbers_of_heads(heads, cross_tiles):
    case = masked(2, heads, 5, 16, torch.float32)
    masked_within_the_rule(case, case.run())


@pytest.mark.parametrize("shape", ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)))
def test_nothing_to_do(shape, kernels):
    q = torch.zeros(shape, requires_grad=True)
    keep = torch.ones(shape[0], shape[2], dtype=torch.bool)
    out = sk.masked_attention(q, q, q, keep)
    assert out.shape == torch.autograd.grad(out.sum(), q)[0].shape == shape
    assert kernels in ([], LIST)
    kernels.append("nothing to launch")


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("share", (0.0, 1.0))
def test_none_or_all_kept(share, keys, cross_tiles):
    case = every_row_finite(masked(2, 1, 33, 16, torch.float32, keys=keys))
    case.keep[:] = bool(share)
    found = case.run()
    masked_within_the_rule(case, found)
    assert any(x.any() for x in found) == bool(share)


@pytest.mark.parametrize("scale", (-0.7, 0.0, 3.0))
def test_scales(scale, cross_tiles):
    case = masked(2, 1, 40, 16, torch.float32, scale=scale)
    masked_within_the_rule(case, case.run())


def test_half_precision_scores_do_not_overflow(cross_tiles):
    """q . k reaches 2.6e6 here, forty times what fp16 holds."""
    case = masked(2, 1, 40, 64, torch.float16)
    for x in case.qkv[:2]:
        x.data = (x.data + 200).round()  # sums of integers are exact in any order
    found = case.run()
    assert found[0].isfinite().all()
    masked_within_the_rule(case, found)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_what_is_not_kept_is_never_read(value, cross_tiles):
    case = masked(3, 1, 40, 16, torch.bfloat16)
    dropped = ~case.keep[:, None, :, None].expand(-1, 1, -1, 16)
    clean, spoilt = (
        masked_of(case.keep, [*(x.masked_fill(dropped, fill) for x in case.tensors[:3]), cotangent])
        for fill, cotangent in ((0.5, case.cotangent.masked_fill(dropped, 0.5)), (value, case.cotangent))
    )
    identical(spoilt.run(), clean.run())


def test_a_nan_score_makes_its_row_nan(cross_tiles):
    case = masked(2, 2, 20, 16, torch.float32)
    clean = case.run()[0]
    q, k, _ = (x.data for x in case.qkv)
    for value in (math.nan, math.inf):
        q[0, 1, 3, 2] = value
        out = case.run()[0]
        assert out[0, 1, 3].isnan().all()
        out[0, 1, 3] = clean[0, 1, 3]
        assert torch.equal(out, clean)
    k[0, 0, 5] = math.nan
    out = case.run()[0]
    assert out[0, 0].isnan().all() and torch.equal(out[1], clean[1])


def test_a_key_that_nobody_weighs_may_hold_infinity(cross_tiles):
    """Its scores are minus infinity, so its gradients are zero, not 0 * inf; of the queries there are no whole blocks."""
    case = masked(1, 1, 21, 16, torch.float32)
    q, k, _ = (x.data for x in case.qkv)
    q.abs_()
    k[0, 0, 5, 3] = -math.inf
    out, _, grad_k, grad_v = case.run()
    assert out.isfinite().all() and grad_k.isfinite().all() and not grad_k[0, 0, 5].any() and not grad_v[0, 0, 5].any()


VIEWS = {
    "offset": offset,
    "wide_rows": wide_rows,
    "contiguous": lambda x: x.contiguous(),
    "shared_by_heads": lambda x: x[:, :1].expand_as(x),
    "one_row": lambda x: x[:, :, :1].expand_as(x),
    "shared_by_images": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, cross_tiles):
    keep = torch.rand(2, 22) < 0.6
    strided = [VIEWS[view](x).detach() for x in torch.randn(4, 2, 2, 22, 16)]
    packed = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    identical(masked_of(keep, strided).run(), masked_of(keep, packed).run())


def test_a_gradient_without_strides(cross_tiles):
    """What ``sum`` passes back: one number expanded over everything."""
    case = masked(2, 2, 22, 16, torch.float32)
    case.cotangent = torch.tensor(1.5).expand(2, 2, 22, 16)
    masked_within_the_rule(case, case.run())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_mates_do_not_matter(dtype, cross_tiles):
    images_of_masks_do_not_matter_to_each_other(masked(4, 1, 33, 16, dtype))


def far_apart(values: torch.Tensor, image: int, row: int) -> torch.Tensor:
    """The same [B, 1, L, D] with far-apart images and rows; memory that nobody touches costs nothing."""
    batch, _, length, dim = values.shape
    size = (batch - 1) * image + (length - 1) * row + dim
    far = torch.empty(size, dtype=values.dtype).as_strided(values.shape, (image, dim, row, 1))
    return far.copy_(values.detach())


@pytest.mark.parametrize("image, row", ((2**31 + 64, 16), (16, 2**30 + 8)))
def test_offsets_past_2_to_the_31(image, row, cross_tiles):
    case = every_row_finite(masked(2, 1, 3, 16, torch.bfloat16))
    q, k, v, grad = (far_apart(x, image, row) for x in (*case.qkv, case.cotangent))
    rows, counts = torch.ops.step_kernels.kept_rows(case.keep)
    out, lse = torch.ops.step_kernels.masked_attention(q, k, v, rows, counts, False, None, True)
    arguments = (grad, q, k, v, far_apart(out, image, row), lse, rows, counts, False, None)
    identical([out, *torch.ops.step_kernels.masked_attention_backward(*arguments)], case.run())


def test_log_sum_exp(cross_tiles):
    case = masked(3, 1, 40, 16, torch.float32)
    qkv = [x.detach() for x in case.qkv]
    index = torch.ops.step_kernels.kept_rows(case.keep)
    op = torch.ops.step_kernels.masked_attention
    ours = op(*qkv, *index, False, 0.3, True)[1]
    with sk.use_backend("reference"):
        plain = op(*qkv, *index, False, 0.3, True)[1]
        truth = op(*(x.double() for x in qkv), *index, False, 0.3, True)[1]
    assert ours.dtype == torch.float32 and not ours.transpose(1, 2)[~case.keep].any()
    error_rule(ours, plain, truth)


def test_inference_saves_no_log_sum_exp(cross_tiles, kernels):
    case = masked(2, 1, 20, 16, torch.float32)
    expected = case.run()
    index = torch.ops.step_kernels.kept_rows(case.keep)
    kernels.clear()
    out, lse = torch.ops.step_kernels.masked_attention(*case.qkv, *index, False, None, False)
    assert lse.shape == (0,)
    identical([out, *torch.autograd.grad(out, case.qkv, case.cotangent)], expected)
    assert kernels == [*FORWARD[1:], *FORWARD[1:], *BACKWARD]  # its backward pass has to make up for it


def test_a_mask_of_other_bytes_than_one():
    """An image's mask of 0 and 255, seen as bool: any byte but 0 is True, as PyTorch has it."""
    keep = torch.tensor([[255, 0, 255, 0, 255, 0, 0, 0]], dtype=torch.uint8).view(torch.bool)
    q, k, v = torch.randn(3, 1, 1, 8, 16)
    ours = sk.masked_attention(q, k, v, keep)
    with sk.use_backend("reference"):
        torch.testing.assert_close(ours, sk.masked_attention(q, k, v, torch.tensor([[1, 0, 1, 0, 1, 0, 0, 0]]).bool()))
