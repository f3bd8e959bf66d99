"""merge_tokens, scatter_back, scatter_into, their gradients and layout.sides() on a GPU against the CPU reference."""

import pytest
import torch
from gpu.syncs import no_sync
from tensors import error_rule, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu

SIDES = (2, 4, 8, 16)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTH = 192


def a_layout(batch: int, grid: tuple[int, int], num_prefix: int = 1) -> sk.SupertokenLayout:
    """Random blocks of all sides; untrimmed, on the CPU."""
    scores = [torch.randn(batch, grid[0] // side, grid[1] // side) for side in SIDES]
    with sk.use_backend("reference"):
        return sk.resolve_layout(scores, sides=SIDES, thresholds=0.7, grid=grid, num_prefix=num_prefix)


GRIDS = [(1, (1, 1)), (8, (64, 64)), (3, (17, 33)), (256, (16, 16)), (2, (128, 256))]


@pytest.mark.parametrize(("batch", "grid"), GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_tokens(batch, grid, dtype):
    layout = a_layout(batch, grid)
    live = layout.num_tokens
    tokens = torch.randn(batch, grid[0] * grid[1], WIDTH).to(dtype)
    prefix = torch.randn(1, WIDTH).to(dtype)
    cotangent = poison(torch.randn(layout.capacity, WIDTH).to(dtype), live)
    with sk.use_backend("reference"):
        plain = forward_and_gradients(tokens, prefix, layout, cotangent)
        exact = forward_and_gradients(tokens.double(), prefix.double(), layout, cotangent.double())
    on_gpu = tokens.cuda(), prefix.cuda(), layout.to("cuda"), cotangent.cuda()
    forward_and_gradients(*on_gpu)  # compiles
    with no_sync():
        ours = forward_and_gradients(*on_gpu)
    for got, peer, truth in zip(ours, plain, exact, strict=True):
        error_rule(got.cpu(), peer, truth)


def forward_and_gradients(tokens, prefix, layout, cotangent):
    tokens, prefix = tokens.detach().requires_grad_(), prefix.detach().requires_grad_()
    out = sk.merge_tokens(tokens, layout, prefix=prefix)
    return out.detach(), *torch.autograd.grad(out, (tokens, prefix), cotangent)


@pytest.mark.parametrize(("batch", "grid"), GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_is_exact(batch, grid, dtype):
    layout = a_layout(batch, grid)
    values = poison(torch.randn(layout.capacity, WIDTH).to(dtype), layout.num_tokens)
    where = torch.rand(layout.capacity) < 0.6
    canvas = torch.randn(batch, WIDTH, *grid).to(dtype)
    on_gpu = layout.to("cuda")
    for chosen in (None, where):
        with sk.use_backend("reference"):
            expected = sk.scatter_back(values, layout, where=chosen)
            expected_canvas = sk.scatter_into(canvas.clone(), values, layout, where=chosen)
        chosen = None if chosen is None else chosen.cuda()
        assert torch.equal(sk.scatter_back(values.cuda(), on_gpu, where=chosen).cpu(), expected)
        assert torch.equal(sk.scatter_into(canvas.cuda(), values.cuda(), on_gpu, where=chosen).cpu(), expected_canvas)
    with sk.use_backend("reference"):
        sides = layout.sides()
    assert torch.equal(on_gpu.sides().cpu(), sides)


def test_ten_runs_are_identical():
    layout = a_layout(8, (64, 64)).to("cuda")
    tokens = torch.randn(8, 4096, WIDTH, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(10):
        merged = sk.merge_tokens(tokens, layout)
        runs.append((merged, sk.scatter_back(merged, layout)))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_batch_mates_do_not_matter():
    layout = a_layout(4, (32, 32))
    tokens = torch.randn(4, 1024, WIDTH, device="cuda")
    merged = sk.merge_tokens(tokens, layout.to("cuda"))
    with sk.use_backend("reference"):
        alone = sk.SupertokenLayout.from_sides(layout.sides()[2:3], num_prefix=1)
    start, stop = layout.cu_seqlens[2:4].tolist()
    assert torch.equal(sk.merge_tokens(tokens[2:3], alone.to("cuda"))[: stop - start], merged[start:stop])


def test_a_captured_merge_and_scatter_replay_on_other_layouts():
    first, second = (a_layout(4, (32, 32)).to("cuda") for _ in range(2))
    layout = sk.SupertokenLayout(first.cu_seqlens.clone(), first.cells.clone(), (32, 32), 1)
    tokens = torch.randn(4, 1024, WIDTH, device="cuda")
    run = lambda layout: sk.scatter_back(sk.merge_tokens(tokens, layout), layout)  # noqa: E731
    run(layout)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        canvas = run(layout)
    layout.cu_seqlens.copy_(second.cu_seqlens)
    layout.cells.copy_(second.cells)
    tokens.normal_()
    graph.replay()
    assert torch.equal(canvas, run(second))


def test_more_than_2_to_the_31_elements():
    batch, grid, width = 2, (1024, 1024), 1032  # 2.2e9 elements in each of tokens and canvas
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    layout = sk.SupertokenLayout.uniform(batch, grid, side=8, device="cuda")
    tokens = torch.empty(batch, grid[0] * grid[1], width, device="cuda", dtype=torch.float16)
    tokens[:] = torch.arange(width, device="cuda") % 7
    tokens[1] += 1
    merged = sk.merge_tokens(tokens, layout)
    assert torch.equal(merged[:16384], (torch.arange(width, device="cuda") % 7).half().expand(16384, -1))
    assert torch.equal(merged[16384:], (torch.arange(width, device="cuda") % 7 + 1).half().expand(16384, -1))
    del tokens
    canvas = sk.scatter_back(merged, layout)
    assert torch.equal(canvas[1, :, -1, -1], merged[-1]) and torch.equal(canvas[1, :, 500, 3], merged[-1])
    assert torch.equal(canvas[0, :, -1, -1], merged[0])


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layout = a_layout(2, (16, 16))
    tokens = torch.randn(2, 256, WIDTH)
    with torch.cuda.device(0):
        second = sk.merge_tokens(tokens.to("cuda:1"), layout.to("cuda:1"))
    assert torch.equal(second.cpu(), sk.merge_tokens(tokens.to("cuda:0"), layout.to("cuda:0")).cpu())
