"""class_attention on a GPU against the CPU reference."""

import pytest
import torch
from cases.cross_attention import DTYPES, Classes, assert_identical, classes, classes_within_the_rule
from gpu.syncs import no_sync
from tensors import error_rule

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(size, dtype):
    case = classes(*size, dtype, spare=100)
    on_gpu = case.to("cuda")
    cu_seqlens = on_gpu.cu_seqlens
    on_gpu.run(cu_seqlens=cu_seqlens)  # compiles
    with no_sync():
        found = on_gpu.run(cu_seqlens=cu_seqlens)
    classes_within_the_rule(case, [x.cpu() for x in found])


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
    shared, copied = (
        Classes(SPREAD, [q.requires_grad_(), *case.inputs[1:]], case.cotangents).run()
        for q in (expanded, expanded.clone())
    )
    assert_identical(shared, copied)


def test_ten_runs_are_identical():
    case = classes(SPREAD, 150, 6, 64, torch.bfloat16).to("cuda")
    first = case.run()
    for _ in range(9):
        assert_identical(case.run(), first)


def test_batch_mates_do_not_matter():
    case = classes((130, 0, 197, 5), 30, 2, 64, torch.bfloat16, spare=0).to("cuda")
    together = case.run()
    start = 0
    for image, length in enumerate(case.lengths):
        rows, one = slice(start, start + length), slice(image, image + 1)
        start += length
        pieces = [one, rows, rows, one, rows]
        xs = [x.detach()[i].clone() for x, i in zip((*case.inputs, *case.cotangents), pieces, strict=True)]
        alone = Classes((length,), [x.requires_grad_() for x in xs[:3]], xs[3:]).run()
        assert_identical(alone, [x[i] for x, i in zip(together, (one, rows, one, rows, rows), strict=True)])


def test_a_captured_call_replays_on_other_lengths():
    case = classes((300, 0, 200), 30, 2, 64, torch.bfloat16, spare=0).to("cuda")
    q, k, v = (x.detach() for x in case.inputs)
    cu_seqlens = case.cu_seqlens.clone()
    run = lambda cu_seqlens: sk.class_attention(q, k, v, cu_seqlens, 500, return_scores=True)  # noqa: E731
    run(cu_seqlens)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cu_seqlens)
    for bounds in ((0, 10, 490, 500), (0, 0, 0, 300), (0, 0, 0, 0)):
        other = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        cu_seqlens.copy_(other)
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        assert_identical(captured, run(other))


def test_more_than_2_to_the_31_elements():
    """2^20 + 100 rows x 32 heads x 64 channels; the last image lies past 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
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
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = classes((130, 0, 65), 20, 2, 64, torch.bfloat16)
    with torch.cuda.device(0):
        second = case.to("cuda:1").run()
    assert_identical([x.cpu() for x in second], [x.cpu() for x in case.to("cuda:0").run()])
