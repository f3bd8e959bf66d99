"""masked_attention on a GPU against the CPU reference."""

import pytest
import torch
from cases.cross_attention import images_of_masks_do_not_matter_to_each_other, masked, masked_of, masked_within_the_rule
from floors import reference
from gpu.syncs import beside_peer, capture, needs_memory, no_sync, same_where_not_current, ten_runs_are_identical
from tensors import LOW_PRECISION, identical, matmuls_in

import step_kernels as sk

pytestmark = pytest.mark.gpu


# batch, heads, length, head_dim
SIZES = [
    (1, 1, 1, 16),
    (3, 3, 197, 64),
    (4, 2, 577, 72),
    (2, 2, 1025, 80),
    (3, 1, 300, 128),
    (2, 1, 130, 256),
    (64, 1, 50, 32),
]


@pytest.mark.parametrize("keys", ("kept", "all"))
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(size, dtype, keys):
    case = masked(*size, dtype, keys=keys)
    on_gpu = case.to("cuda")
    on_gpu.run()  # compiles
    with no_sync():
        found = on_gpu.run()
    assert all(x.transpose(1, 2).is_contiguous() for x in found)
    if size[2] == 1:  # the gradient of the only key's score is zero: a difference of equal numbers
        for ours, exact in zip(found, reference(case.to(torch.float64).run), strict=True):
            torch.testing.assert_close(ours.cpu().double(), exact, rtol=0.02, atol=0.02)
    else:
        masked_within_the_rule(beside_peer(case), [x.cpu() for x in found])


@pytest.mark.parametrize("length", (0, 1, 1023, 1025, 5000))
def test_the_list_of_kept_rows_is_exact(length):
    keep = torch.rand(5, length) < 0.4
    keep[:1], keep[1:2] = True, False
    found = torch.ops.step_kernels.kept_rows(keep.cuda())
    identical([x.cpu() for x in found], reference(torch.ops.step_kernels.kept_rows, keep))


def test_fp32_follows_the_precision_setting():
    """With tf32 allowed the results may differ, but not by more than tf32's rounding."""
    case = masked(2, 2, 130, 64, torch.float32).to("cuda")
    exact = case.run()
    with matmuls_in("tf32"):
        rounded = case.run()
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_runs_repeat():
    ten_runs_are_identical(masked(4, 6, 1025, 64, torch.bfloat16).to("cuda").run)


def test_batch_mates_do_not_matter():
    images_of_masks_do_not_matter_to_each_other(masked(4, 2, 300, 64, torch.bfloat16).to("cuda"))


def test_a_captured_call_replays_on_other_tokens_and_masks():
    cases = [masked(3, 2, 300, 64, torch.bfloat16, share=share).to("cuda") for share in (0.3, 0.9, 0.0)]
    inputs = [x.detach().clone() for x in cases[0].qkv]
    keep = cases[0].keep.clone()
    replay = capture(lambda: [sk.masked_attention(*inputs, keep)])
    for case in cases[1:]:
        for static, fresh in zip((*inputs, keep), (*case.qkv, case.keep), strict=True):
            static.copy_(fresh.detach())
        with torch.no_grad():
            identical(replay(), [sk.masked_attention(*case.qkv, case.keep)])


def test_more_than_2_to_the_31_elements():
    """2 images x 2^20 rows x 16 heads x 65 channels; a hundred rows of each image take part."""
    needs_memory(36)
    batch, heads, length, dim = 2, 16, 2**20, 65
    x = torch.empty(batch, length, heads, dim, device="cuda", dtype=torch.float16).transpose(1, 2)
    assert x.numel() > 2**31
    keep = torch.zeros(batch, length, device="cuda", dtype=torch.bool)
    keep[0, :100], keep[1, -100:] = True, True
    rows = torch.randn(batch, heads, 100, dim)
    small = masked_of(torch.ones(batch, 100, dtype=torch.bool), [rows.half() for _ in range(4)])
    for b, place in enumerate((slice(100), slice(-100, None))):
        x[b, :, place] = rows[b].to(x)
    index = torch.ops.step_kernels.kept_rows(keep)
    out, lse = torch.ops.step_kernels.masked_attention(x, x, x, *index, False, None, True)
    found = [out, *torch.ops.step_kernels.masked_attention_backward(x, x, x, x, out, lse, *index, False, None)]
    taken = [torch.stack([y[0, :, :100], y[1, :, -100:]]).cpu() for y in found]
    masked_within_the_rule(small, taken)
    for y in found:
        assert not y[0, :, 100:].any() and not y[1, :, :-100].any()


def test_a_device_that_is_not_current():
    case = masked(3, 2, 130, 64, torch.bfloat16)
    same_where_not_current(lambda device: case.to(device).run())
