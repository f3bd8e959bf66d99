"""masked_attention on a GPU against the CPU reference."""

import pytest
import torch
from cases.cross_attention import DTYPES, Masked, assert_identical, masked, masked_within_the_rule
from gpu.syncs import no_sync

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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(size, dtype, keys):
    case = masked(*size, dtype, keys=keys)
    on_gpu = case.to("cuda")
    on_gpu.run()  # compiles
    with no_sync():
        found = on_gpu.run()
    assert all(x.transpose(1, 2).is_contiguous() for x in found)
    if size[2] == 1:  # the gradient of the only key's score is zero: a difference of equal numbers
        with sk.use_backend("reference"):
            expected = case.to(torch.float64).run()
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu().double(), exact, rtol=0.02, atol=0.02)
    else:
        masked_within_the_rule(case, [x.cpu() for x in found])


@pytest.mark.parametrize("length", (0, 1, 1023, 1025, 5000))
def test_the_list_of_kept_rows_is_exact(length):
    keep = torch.rand(5, length) < 0.4
    keep[:1], keep[1:2] = True, False
    found = torch.ops.step_kernels.kept_rows(keep.cuda())
    with sk.use_backend("reference"):
        assert_identical([x.cpu() for x in found], torch.ops.step_kernels.kept_rows(keep))


def test_fp32_follows_the_precision_setting():
    """With tf32 allowed the results may differ, but not by more than tf32's rounding."""
    case = masked(2, 2, 130, 64, torch.float32).to("cuda")
    exact = case.run()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = case.run()
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_ten_runs_are_identical():
    case = masked(4, 6, 1025, 64, torch.bfloat16).to("cuda")
    first = case.run()
    for _ in range(9):
        assert_identical(case.run(), first)


def test_batch_mates_do_not_matter():
    case = masked(4, 2, 300, 64, torch.bfloat16).to("cuda")
    together = case.run()
    for b in range(4):
        one = slice(b, b + 1)
        qkv = [x.detach()[one].clone().requires_grad_() for x in case.qkv]
        assert_identical(Masked(case.keep[one], qkv, case.cotangent[one]).run(), [x[one] for x in together])


def test_a_captured_call_replays_on_other_tokens_and_masks():
    cases = [masked(3, 2, 300, 64, torch.bfloat16, share=share).to("cuda") for share in (0.3, 0.9, 0.0)]
    inputs = [x.detach().clone() for x in cases[0].qkv]
    keep = cases[0].keep.clone()
    sk.masked_attention(*inputs, keep)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sk.masked_attention(*inputs, keep)
    for case in cases[1:]:
        for static, fresh in zip((*inputs, keep), (*case.qkv, case.keep), strict=True):
            static.copy_(fresh.detach())
        graph.replay()
        with torch.no_grad():
            assert torch.equal(out, sk.masked_attention(*case.qkv, case.keep))


def test_more_than_2_to_the_31_elements():
    """2 images x 2^20 rows x 16 heads x 65 channels; a hundred rows of each image take part."""
    if torch.cuda.mem_get_info()[0] < 36 * 2**30:
        pytest.skip("needs 36 GiB of free GPU memory")
    batch, heads, length, dim = 2, 16, 2**20, 65
    x = torch.empty(batch, length, heads, dim, device="cuda", dtype=torch.float16).transpose(1, 2)
    assert x.numel() > 2**31
    keep = torch.zeros(batch, length, device="cuda", dtype=torch.bool)
    keep[0, :100], keep[1, -100:] = True, True
    rows = torch.randn(batch, heads, 100, dim)
    small = Masked(
        torch.ones(batch, 100, dtype=torch.bool), [rows.half().requires_grad_() for _ in range(3)], rows.half()
    )
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
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = masked(3, 2, 130, 64, torch.bfloat16)
    with torch.cuda.device(0):
        second = case.to("cuda:1").run()
    assert_identical([x.cpu() for x in second], [x.cpu() for x in case.to("cuda:0").run()])
