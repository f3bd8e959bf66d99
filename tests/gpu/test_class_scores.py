"""class_scores on a GPU against the CPU reference."""

import pytest
import torch
from cases.class_scores import Scores, batch_mates_do_not_matter, scores_case, scores_within_the_rule
from gpu.syncs import capture, needs_memory, no_sync, same_where_not_current, ten_runs_are_identical
from tensors import LOW_PRECISION, identical, matmuls_in

import step_kernels as sk

pytestmark = pytest.mark.gpu

SPREAD = (397, 0, 1025, 63, 1, 640)
# lengths, classes, width
SIZES = [(SPREAD, 150, 1024), ((17, 3), 1, 16), ((300, 0, 65), 19, 300), ((130, 197), 171, 17), ((5,) * 256, 7, 192)]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(size, dtype):
    case = scores_case(*size, dtype, spare=100, scale=0.1)
    on_gpu = case.to("cuda")
    cu_seqlens = on_gpu.cu_seqlens
    on_gpu.run(cu_seqlens=cu_seqlens)  # compiles
    with no_sync():
        found = on_gpu.run(cu_seqlens=cu_seqlens)
    scores_within_the_rule(case, [x.cpu() for x in found])


def test_tf32():
    case = scores_case(SPREAD, 150, 1024, torch.float32, spare=100, scale=0.1).to("cuda")
    with matmuls_in("tf32"):
        scores_within_the_rule(case, case.run())


def test_vectors_shared_by_the_images():
    case = scores_case(SPREAD, 150, 192, torch.bfloat16).to("cuda")
    case.q = case.q[:1].expand_as(case.q)
    shared = case.run()
    case.q = case.q.clone()
    identical(shared, case.run())


def test_runs_repeat():
    ten_runs_are_identical(scores_case(SPREAD, 150, 384, torch.bfloat16).to("cuda").run)


def test_batch_mates_do_not_matter():
    batch_mates_do_not_matter(scores_case((130, 0, 197, 5), 30, 384, torch.bfloat16, spare=0).to("cuda"))


def test_a_captured_call_replays_on_other_lengths():
    case = scores_case((300, 0, 200), 150, 384, torch.bfloat16, spare=0).to("cuda")
    q, k, cu_seqlens = case.q, case.k, case.cu_seqlens.clone()
    replay = capture(lambda: [sk.class_scores(q, k, cu_seqlens)])
    for bounds in ((0, 10, 490, 500), (0, 0, 0, 300), (0, 0, 0, 0)):
        other = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        cu_seqlens.copy_(other)
        for x in (q, k):
            x.normal_()
        identical(replay(), [sk.class_scores(q, k, other)])


def test_more_than_2_to_the_31_elements():
    """2^20 + 100 rows of 2048 channels; the last image lies past 2^31 elements."""
    needs_memory(16)
    case = scores_case((100,), 8, 2048, torch.float16, spare=0, scale=0.02)
    long, rows = 2**20, 2**20 + 100
    k = torch.zeros(rows, 2048, device="cuda", dtype=torch.float16)
    grad = torch.zeros(rows, 8, device="cuda", dtype=torch.float16)
    q = torch.zeros(2, 8, 2048, device="cuda", dtype=torch.float16)
    assert k.numel() > 2**31
    q[1], k[long:], grad[long:] = case.q[0].cuda(), case.k.cuda(), case.cotangent.cuda()
    found = Scores((long, 100), q, k, grad, scale=0.02).run()
    pieces = slice(long, None), slice(1, 2), slice(long, None)
    scores_within_the_rule(case, [x[i].cpu() for x, i in zip(found, pieces, strict=True)])


def test_a_device_that_is_not_current():
    case = scores_case((130, 0, 65), 20, 128, torch.bfloat16)
    same_where_not_current(lambda device: case.to(device).run())
