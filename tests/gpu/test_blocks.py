"""merge_tokens, scatter_back, scatter_into, their gradients and layout.sides() on a GPU against the CPU reference."""

import pytest
import torch
from cases.merge import pooled
from floors import hold, reference
from gpu.syncs import capture, needs_memory, same_where_not_current, ten_runs_are_identical
from layouts import mixed
from tensors import LOW_PRECISION, identical, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu

WIDTH = 192


GRIDS = [(1, (1, 1)), (8, (64, 64)), (3, (17, 33)), (256, (16, 16)), (2, (128, 256))]


@pytest.mark.parametrize(("batch", "grid"), GRIDS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_merge_tokens(batch, grid, dtype):
    layout = mixed(batch, grid, threshold=0.7)
    tokens = torch.randn(batch, grid[0] * grid[1], WIDTH).to(dtype)
    cotangent = poison(torch.randn(layout.capacity, WIDTH).to(dtype), layout.num_tokens)
    hold(pooled, tokens, torch.randn(1, WIDTH).to(dtype), layout, cotangent, device="cuda")


@pytest.mark.parametrize(("batch", "grid"), GRIDS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_scatter_is_exact(batch, grid, dtype):
    layout = mixed(batch, grid, threshold=0.7)
    values = poison(torch.randn(layout.capacity, WIDTH).to(dtype), layout.num_tokens)
    where = torch.rand(layout.capacity) < 0.6
    canvas = torch.randn(batch, WIDTH, *grid).to(dtype)
    on_gpu = layout.to("cuda")
    for chosen in (None, where):
        expected = reference(sk.scatter_back, values, layout, where=chosen)
        expected_canvas = reference(sk.scatter_into, canvas.clone(), values, layout, where=chosen)
        chosen = None if chosen is None else chosen.cuda()
        assert torch.equal(sk.scatter_back(values.cuda(), on_gpu, where=chosen).cpu(), expected)
        assert torch.equal(sk.scatter_into(canvas.cuda(), values.cuda(), on_gpu, where=chosen).cpu(), expected_canvas)
    assert torch.equal(on_gpu.sides().cpu(), reference(layout.sides))


def test_runs_repeat():
    layout = mixed(8, (64, 64)).to("cuda")
    tokens = torch.randn(8, 4096, WIDTH, device="cuda", dtype=torch.bfloat16)

    def run():
        merged = sk.merge_tokens(tokens, layout)
        return merged, sk.scatter_back(merged, layout)

    ten_runs_are_identical(run)


def test_batch_mates_do_not_matter():
    layout = mixed(4, (32, 32))
    tokens = torch.randn(4, 1024, WIDTH, device="cuda")
    merged = sk.merge_tokens(tokens, layout.to("cuda"))
    alone = reference(lambda: sk.SupertokenLayout.from_sides(layout.sides()[2:3], num_prefix=1))
    start, stop = layout.cu_seqlens[2:4].tolist()
    assert torch.equal(sk.merge_tokens(tokens[2:3], alone.to("cuda"))[: stop - start], merged[start:stop])


def test_a_captured_merge_and_scatter_replay_on_other_layouts():
    first, second = (mixed(4, (32, 32)).to("cuda") for _ in range(2))
    layout = sk.SupertokenLayout(first.cu_seqlens.clone(), first.cells.clone(), (32, 32), 1)
    tokens = torch.randn(4, 1024, WIDTH, device="cuda")
    run = lambda layout: [sk.scatter_back(sk.merge_tokens(tokens, layout), layout)]  # noqa: E731
    replay = capture(lambda: run(layout))
    layout.cu_seqlens.copy_(second.cu_seqlens)
    layout.cells.copy_(second.cells)
    tokens.normal_()
    identical(replay(), run(second))


def test_more_than_2_to_the_31_elements():
    batch, grid, width = 2, (1024, 1024), 1032  # 2.2e9 elements in each of tokens and canvas
    needs_memory(14)
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
    layout, tokens = mixed(2, (16, 16)), torch.randn(2, 256, WIDTH)
    same_where_not_current(lambda device: [sk.merge_tokens(tokens.to(device), layout.to(device))])
