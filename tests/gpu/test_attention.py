"""ragged_attention and attention_schedule on a GPU against the CPU reference."""

import pytest
import torch
from cases.attention import (
    assert_within_the_rule,
    batch_mates_do_not_matter,
    case_of,
    make_case,
    nan_does_not_leak,
    of_integers,
    overflowing,
)
from floors import reference
from gpu.syncs import beside_peer, capture, needs_memory, no_sync, same_where_not_current, ten_runs_are_identical
from tensors import LOW_PRECISION, identical, matmuls_in

import step_kernels as sk
from step_kernels import attention_provider

pytestmark = pytest.mark.gpu

LENGTHS = (0, 1, 2, 3, 17, 63, 65, 127, 197, 577)


def on_cpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.cpu() for x in tensors]


@pytest.mark.parametrize("scheduled", (False, True))
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_forward_and_backward(dtype, scheduled):
    case = make_case(LENGTHS, 4, 64, dtype, spare=300)
    gpu, cu_seqlens = case.to("cuda"), case.cu_seqlens.cuda()

    def call():
        schedule = sk.attention_schedule(cu_seqlens, len(gpu.cotangent)) if scheduled else None
        out = sk.ragged_attention(*gpu.qkv, cu_seqlens, 577, schedule=schedule)
        return [out, *torch.autograd.grad(out, gpu.qkv, gpu.cotangent)]

    call()  # compiles
    with no_sync():
        found = call()
    assert_within_the_rule(beside_peer(case), on_cpu([x.detach() for x in found]))


@pytest.mark.parametrize("dtype", LOW_PRECISION[1:])
def test_by_varlen_attn(dtype, monkeypatch):
    """With NaN past the live count and a bound above the longest image, also inside a graph."""
    monkeypatch.setattr(attention_provider, "named", "varlen")
    case = make_case(LENGTHS, 4, 64, dtype, spare=300)
    gpu, cu_seqlens = case.to("cuda"), case.cu_seqlens.cuda()
    with no_sync():
        out = sk.ragged_attention(*gpu.qkv, cu_seqlens, 1000)
        found = [out, *torch.autograd.grad(out, gpu.qkv, gpu.cotangent)]
    assert_within_the_rule(case, on_cpu([x.detach() for x in found]))
    qkv = [x.detach() for x in gpu.qkv]
    identical(capture(lambda: [sk.ragged_attention(*qkv, cu_seqlens, 1000)])(), [out.detach()])


@pytest.mark.parametrize("lengths", ((4097,), (1000, 4097, 400, 0, 2500)))
def test_long_images(lengths):
    case = make_case(lengths, 2, 64, torch.bfloat16)
    assert_within_the_rule(case, on_cpu(case.to("cuda").run(scheduled=True)))


DIMS = (1, 5, 16, 24, 32, 72, 80, 88, 96, 128, 160, 192, 256)
# Each is four kernels to compile. The half precisions share their tiles, so they take turns.
TURNS = [(dim, LOW_PRECISION[1 + i % 2]) for i, dim in enumerate(DIMS)] + [(dim, torch.float32) for dim in DIMS[1::3]]


@pytest.mark.parametrize(("dim", "dtype"), TURNS)
def test_head_dimensions(dim, dtype):
    case = make_case((197, 33), 2, dim, dtype)
    assert_within_the_rule(beside_peer(case), on_cpu(case.to("cuda").run()))


@pytest.mark.parametrize("heads", (1, 3, 16, 25))
@pytest.mark.parametrize("precision", ("highest", "high"))
def test_heads_and_precisions(heads, precision):
    """ "high" lets fp32 run as tf32, whose mantissa has 10 bits: held to fp16's rule."""
    dtype = torch.float32 if precision == "highest" else torch.float16
    case = make_case((197, 0, 65), heads, 64, dtype, biased=True, scale=-0.1)
    assert_within_the_rule(beside_peer(case), on_cpu(case.to("cuda").run()))
    if precision == "high":
        with matmuls_in("tf32"):
            found = [x.to(dtype) for x in on_cpu(case.to("cuda", torch.float32).run())]
        assert_within_the_rule(case, found)


@pytest.mark.parametrize("lengths", ((), (0,), (0, 0, 0), (1,), (1, 1, 1), (0, 5, 0, 0, 3, 0), (1,) * 1100))
@pytest.mark.parametrize("spare", (0, 300))
def test_empty_images_and_tails(lengths, spare):
    case = make_case(lengths, 2, 64, torch.float16, spare=spare)
    case = case if max(lengths, default=0) > 1 else of_integers(case)
    for scheduled in (False, True):
        assert_within_the_rule(case, on_cpu(case.to("cuda").run(scheduled=scheduled)))


def test_a_schedule_changes_nothing_and_runs_repeat():
    case = make_case((1000, 4097, 17, 0, 2500), 3, 64, torch.bfloat16).to("cuda")
    expected = case.run()
    ten_runs_are_identical(case.run)
    identical(case.run(scheduled=True), expected)
    identical(case.run(scheduled=True, max_seqlen=100_000), expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_batch_mates_do_not_matter(dtype):
    batch_mates_do_not_matter(make_case((197, 577, 65), 2, 80, dtype, spare=0).to("cuda"))


@pytest.mark.parametrize("dim", (64, 72))
def test_nan_elsewhere_does_not_leak(dim):
    nan_does_not_leak(make_case((197, 577, 65), 2, dim, torch.bfloat16, spare=200).to("cuda"), slice(197, 774))


def test_scores_that_overflow_or_are_nan():
    case = overflowing(6, 197)
    found = on_cpu(case.to("cuda").run())
    assert found[0].isfinite().all()
    assert_within_the_rule(case, found)
    case.qkv[0].data[3] = torch.nan
    out = case.to("cuda").run()[0]
    assert out[3].isnan().all() and out[[0, 1, 2, 4, 5]].isfinite().all()


def test_keys_biased_to_minus_infinity():
    case = make_case((200, 5), 1, 64, torch.float16, biased=True)
    case.bias[:150] = -torch.inf
    assert_within_the_rule(case, on_cpu(case.to("cuda").run()))
    case.bias[:] = -torch.inf
    assert not any(found.any() for found in case.to("cuda").run())


def test_strides():
    """Descriptors, pointers and strides of zero read the same numbers."""
    x = torch.randn(300, 4, 2, 64, device="cuda", dtype=torch.float16)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=torch.float16)[1:].view_as(x).copy_(x)
    results = []
    for tensor in (x, shifted, x.transpose(0, 2).contiguous().transpose(0, 2)):
        results.append(case_of((197, 100), tensor.unbind(1)).run())
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_a_captured_call_replays_on_new_lengths():
    """Capacity and grid are fixed; lengths, and with them the schedule, live on the device."""
    cases = [
        make_case(lengths, 4, 64, torch.bfloat16, spare=900 - sum(lengths))
        for lengths in ((197, 577), (0, 900), (3, 40))
    ]
    first = cases[0].to("cuda")
    cu_seqlens, qkv = first.cu_seqlens, [x.detach().clone() for x in first.qkv]

    def call():
        schedule = sk.attention_schedule(cu_seqlens, 900)
        return [sk.ragged_attention(*qkv, cu_seqlens, 900, schedule=schedule)]

    replay = capture(call)
    for case in cases:
        moved = case.to("cuda")
        cu_seqlens.copy_(moved.cu_seqlens)
        for buffer, x in zip(qkv, moved.qkv, strict=True):
            buffer.copy_(x.detach())
        (out,) = replay()
        identical([out], call())
        assert_within_the_rule(case, [out.cpu(), *on_cpu(moved.run()[1:])])


def test_more_than_2_to_the_31_elements():
    """The last image, whose rows lie beyond 2^31 elements, gives the bits that it gives alone."""
    images, length, heads, dim = 330, 100, 1024, 64
    rows = images * length
    assert (rows - length) * heads * dim > 2**31
    needs_memory(8 * rows * heads * dim * 2 / 2**30 + 2)
    tensors = [torch.empty(rows, heads, dim, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(4)]
    everything = case_of((length,) * images, tensors).run()
    alone = case_of((length,), [x[-length:].clone() for x in tensors]).run()
    identical([x[-length:] for x in everything], alone)


@pytest.mark.parametrize(
    "lengths", ((), (1,), (129, 0, 128), (5, 300, 5, 300, 1, 0), (400, 2, 5000), tuple(range(1100)))
)
@pytest.mark.parametrize("spare", (0, 1, 2000))
def test_schedule(lengths, spare):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    expected = reference(sk.attention_schedule, cu_seqlens, sum(lengths) + spare)
    on_gpu = cu_seqlens.cuda()
    with no_sync():
        found = sk.attention_schedule(on_gpu, sum(lengths) + spare)
    assert torch.equal(found.cpu(), expected)


def test_a_device_that_is_not_current():
    case = make_case((197, 65), 2, 64, torch.bfloat16)
    same_where_not_current(lambda device: case.to(device).run(scheduled=True))
