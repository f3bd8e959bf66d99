"""class_attention on a GPU against the CPU reference."""

import pytest
import torch
from cases.cross_attention import (
    classes,
    classes_of,
    classes_within_the_rule,
    images_of_classes_do_not_matter_to_each_other,
)
from gpu.syncs import beside_peer, capture, needs_memory, no_sync, same_where_not_current, ten_runs_are_identical
from tensors import LOW_PRECISION, error_rule, identical

import step_kernels as sk

pytestmark = pytest.mark.gpu

SPREAD = (397, 0, 1025, 63, 1, 640)


# lengths, classes, heads, head_dim
SIZES = [
    (SPREAD, 150, 3, 64),
    ((17, 3), 1, 1, 16),
    ((300, 0, 65), 19, 3, 72),
    ((130, 197), 171, 2, 80),
    ((130, 197), 60, 2, 128),
    ((65, 127), 20, 2, 256),
    ((5,) * 256, 7, 2, 32),
]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(size, dtype):
    case = classes(*size, dtype, spare=100)
    on_gpu = case.to("cuda")
    cu_seqlens = on_gpu.cu_seqlens
    on_gpu.run(cu_seqlens=cu_seqlens)  # compiles
    with no_sync():
        found = on_gpu.run(cu_seqlens=cu_seqlens)
    classes_within_the_rule(beside_peer(case), [x.cpu() for x in found])


@pytest.mark.parametrize("used", (0, 1))
def test_gradients_through_one_of_the_two(used):
    case = classes((130, 0, 197), 30, 2, 64, torch.float32)
    results = []
    for backend, one in (("triton", case.to("cuda")), ("reference", case), ("reference", case.to(torch.float64))):
        with sk.use_backend(backend):
            result = sk.class_attention(*one.inputs, one.cu_seqlens, 197, return_scores=True)[used]
            grads = torch.autograd.grad(result, one.inputs, one.cotangents[used], allow_unused=True)
            results.append([torch.zeros_like(x) if g is None else g for x, g in zip(one.inputs, grads, strict=True)])
    for ours, plain, exact in zip(*results, strict=True):
        error_rule(ours.cpu(), plain, exact)


def test_queries_shared_by_the_images():
    case = classes(SPREAD, 150, 3, 64, torch.bfloat16).to("cuda")
    expanded = case.inputs[0].detach()[:1].expand(len(SPREAD), -1, -1, -1)
    identical(*(classes_of(SPREAD, [q, *case.tensors[1:]]).run() for q in (expanded, expanded.clone())))


def test_runs_repeat():
    ten_runs_are_identical(classes(SPREAD, 150, 6, 64, torch.bfloat16).to("cuda").run)


def test_batch_mates_do_not_matter():
    case = classes((130, 0, 197, 5), 30, 2, 64, torch.bfloat16, spare=0).to("cuda")
    images_of_classes_do_not_matter_to_each_other(case)


def test_a_captured_call_replays_on_other_lengths():
    case = classes((300, 0, 200), 30, 2, 64, torch.bfloat16, spare=0).to("cuda")
    q, k, v = (x.detach() for x in case.inputs)
    cu_seqlens = case.cu_seqlens.clone()
    run = lambda cu_seqlens: sk.class_attention(q, k, v, cu_seqlens, 500, return_scores=True)  # noqa: E731
    replay = capture(lambda: run(cu_seqlens))
    for bounds in ((0, 10, 490, 500), (0, 0, 0, 300), (0, 0, 0, 0)):
        other = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        cu_seqlens.copy_(other)
        for x in (q, k, v):
            x.normal_()
        identical(replay(), run(other))


def test_more_than_2_to_the_31_elements():
    """2^20 + 100 rows x 32 heads x 64 channels; the last image lies past 2^31 elements."""
    needs_memory(24)
    case = classes((100,), 8, 32, 64, torch.float16, spare=0)
    rows, long = 2**20 + 100, 2**20
    k, v = (torch.zeros(rows, 32, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    assert k.numel() > 2**31
    q, grad = (torch.zeros(2, 8, 32, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    grad_scores = torch.zeros(rows, 8, device="cuda", dtype=torch.float16)
    for whole, part in zip((q, grad), (case.inputs[0], case.cotangents[0]), strict=True):
        whole[1] = part.detach()[0]
    for whole, part in zip((k, v, grad_scores), (*case.inputs[1:], case.cotangents[1]), strict=True):
        whole[long:] = part.detach().to(whole)
    cu_seqlens = torch.tensor([0, long, rows], dtype=torch.int32, device="cuda")
    out, scores, lse = torch.ops.step_kernels.class_attention(q, k, v, cu_seqlens, None, True, True, True)
    arguments = (grad, grad_scores, q, k, v, out, lse, cu_seqlens, None, True)
    grads = torch.ops.step_kernels.class_attention_backward(*arguments)
    pieces = [slice(1, 2), slice(long, None), slice(1, 2), slice(long, None), slice(long, None)]
    found = [x[i].cpu() for x, i in zip((out, scores, *grads), pieces, strict=True)]
    classes_within_the_rule(case, found)


def test_a_device_that_is_not_current():
    case = classes((130, 0, 65), 20, 2, 64, torch.bfloat16)
    same_where_not_current(lambda device: case.to(device).run())
