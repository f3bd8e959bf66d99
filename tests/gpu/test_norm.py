"""ragged_layer_norm and its gradients on a GPU against the CPU reference."""

import pytest
import torch
from gpu.syncs import no_sync
from tensors import error_rule, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def a_layout(*lengths: int, capacity: int) -> sk.SupertokenLayout:
    """Untrimmed, on the CPU: images of so many side-1 tokens each, in a grid of one row."""
    cells = torch.zeros(capacity, 4, dtype=torch.int32)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for image, length in enumerate(lengths):
        own = cells[starts[image] : starts[image + 1]]
        own[:, 0], own[:, 2], own[:, 3] = image, torch.arange(length), 1
    return sk.SupertokenLayout(starts.int(), cells, (1, max(lengths)), 0, False)


def inputs(capacity: int, live: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    x = (2 * torch.randn(capacity, width) + 1).to(dtype)
    return [poison(x, live), torch.randn(width).to(dtype), torch.randn(width).to(dtype)]


def forward_and_gradients(tensors, cotangent, layout):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = sk.ragged_layer_norm(*tensors, EPS, layout=layout)
    return out.detach(), *torch.autograd.grad(out, tensors, cotangent)


@pytest.mark.parametrize("width", [1, 150, 384, 1024, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_live_rows(width, dtype):
    layout = a_layout(700, 0, 301, 999, capacity=5000)
    tensors, cotangent = inputs(5000, 2000, width, dtype), poison(torch.randn(5000, width).to(dtype), 2000)
    with sk.use_backend("reference"):
        plain = forward_and_gradients(tensors, cotangent, layout)
        exact = forward_and_gradients([tensor.double() for tensor in tensors], cotangent.double(), layout)
    on_gpu = [tensor.cuda() for tensor in tensors], cotangent.cuda(), layout.to("cuda")
    forward_and_gradients(*on_gpu)  # compiles
    with no_sync():
        ours = forward_and_gradients(*on_gpu)
    for got, peer, truth in zip(ours, plain, exact, strict=True):
        error_rule(got.cpu(), peer, truth)


def test_ten_runs_are_identical():
    layout = a_layout(3000, 4000, capacity=9000).to("cuda")
    tensors = [tensor.cuda() for tensor in inputs(9000, 7000, 1024, torch.bfloat16)]
    cotangent = torch.randn(9000, 1024, device="cuda", dtype=torch.bfloat16)
    runs = [forward_and_gradients(tensors, cotangent, layout) for _ in range(10)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_batch_mates_do_not_matter():
    x, weight, bias = (tensor.cuda() for tensor in inputs(3000, 3000, 1024, torch.float32))
    together = sk.ragged_layer_norm(x, weight, bias, EPS, layout=a_layout(1001, 999, capacity=3000).to("cuda"))
    alone = sk.ragged_layer_norm(x[1001:2001], weight, bias, EPS, layout=a_layout(999, capacity=1000).to("cuda"))
    assert torch.equal(alone[:999], together[1001:2000])


def test_a_captured_norm_replays_on_other_counts():
    layout = a_layout(100, 200, capacity=1000).to("cuda")
    x, weight, bias = (tensor.cuda() for tensor in inputs(1000, 1000, 1024, torch.float16))
    run = lambda: sk.ragged_layer_norm(x, weight, bias, EPS, layout=layout)  # noqa: E731
    run()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for live in (0, 1, 700, 1000):
        layout.cu_seqlens.copy_(torch.tensor([0, live // 2, live]))
        x.normal_()
        graph.replay()
        assert torch.equal(out, run()) and not out[live:].any()


def test_more_than_2_to_the_31_elements():
    rows, width = 2**21 + 1, 1024
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.zeros(rows, width, device="cuda", dtype=torch.float16)
    ends = torch.randn(2, width, device="cuda", dtype=torch.float16)
    x[0], x[-1] = ends
    weight, bias = (torch.randn(width, device="cuda", dtype=torch.float16) for _ in range(2))
    out = sk.ragged_layer_norm(x, weight, bias, EPS)
    assert torch.equal(out[[0, -1]], sk.ragged_layer_norm(ends, weight, bias, EPS))
    assert torch.equal(out[rows // 2], bias)
    needed = [True, True, True]
    grads = torch.ops.step_kernels.ragged_layer_norm_backward(x, x, weight, bias, EPS, None, needed)
    expected = torch.ops.step_kernels.ragged_layer_norm_backward(ends, ends, weight, bias, EPS, None, needed)
    assert torch.equal(grads[0][[0, -1]], expected[0])
    torch.testing.assert_close(grads[2], expected[2])


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = inputs(300, 300, 384, torch.float32)
    with torch.cuda.device(0):
        second = sk.ragged_layer_norm(*(tensor.to("cuda:1") for tensor in tensors), EPS)
    first = sk.ragged_layer_norm(*(tensor.to("cuda:0") for tensor in tensors), EPS)
    assert torch.equal(second.cpu(), first.cpu())
