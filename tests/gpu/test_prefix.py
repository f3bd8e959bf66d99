"""replace_prefix and its gradients on a GPU against the CPU reference."""

import pytest
import torch
from floors import reference
from gpu.syncs import no_sync
from layouts import AWKWARD, SPARE_ROWS, build
from tensors import LOW_PRECISION, error_rule, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu


def without_sync(function, *arguments, **named):
    with no_sync():
        return function(*arguments, **named)


def on_gpu(layout: sk.SupertokenLayout) -> sk.SupertokenLayout:
    return sk.SupertokenLayout(
        layout.cu_seqlens.cuda(), layout.cells.cuda(), layout.grid, layout.num_prefix, layout.trimmed
    )


def spread(batch: int, num_prefix: int) -> sk.SupertokenLayout:
    """Untrimmed, images of different lengths, on the CPU."""
    scores = [torch.randn(batch, 64 // side, 64 // side) for side in (2, 4, 8)]
    settings = {"sides": (2, 4, 8), "thresholds": 0.5, "grid": (64, 64), "num_prefix": num_prefix}
    return reference(sk.resolve_layout, scores, **settings)


def assert_same(ours, expected) -> None:
    (tokens, layout), (expected_tokens, expected_layout) = ours, expected
    assert torch.equal(tokens.cpu(), expected_tokens)
    assert torch.equal(layout.cells.cpu(), expected_layout.cells)
    assert torch.equal(layout.cu_seqlens.cpu(), expected_layout.cu_seqlens)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_awkward_layouts(name, spare):
    layout, live = build(AWKWARD[name], spare), len(AWKWARD[name].tokens())
    tokens = poison(torch.randn(layout.capacity, 5), live)
    for new in (0, 1, 6):
        new_prefix = torch.randn(new, 5)
        ours = without_sync(sk.replace_prefix, tokens.cuda(), on_gpu(layout), new_prefix.cuda())
        assert_same(ours, reference(sk.replace_prefix, tokens, layout, new_prefix))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("num_prefix", "new"), ((1, 150), (5, 0), (0, 19)))
@pytest.mark.parametrize("width", (1024, 192, 197))
def test_values_and_gradients_at_realistic_sizes(num_prefix, new, width, dtype):
    layout = spread(8, num_prefix)
    live = int(layout.cu_seqlens[-1])
    tokens, new_prefix = poison(torch.randn(layout.capacity, width).to(dtype), live), torch.randn(new, width).to(dtype)
    ours = without_sync(sk.replace_prefix, tokens.cuda(), on_gpu(layout), new_prefix.cuda())
    assert_same(ours, reference(sk.replace_prefix, tokens, layout, new_prefix))

    backward = torch.ops.step_kernels.replace_prefix_backward
    grad = poison(torch.randn(ours[0].shape).to(dtype), int(ours[1].cu_seqlens[-1]))
    arguments = layout.capacity, new, num_prefix
    found = without_sync(backward, grad.cuda(), layout.cu_seqlens.cuda(), *arguments)
    plain = reference(backward, grad, layout.cu_seqlens, *arguments)
    truth = reference(backward, grad.double(), layout.cu_seqlens, *arguments)
    assert torch.equal(found[0].cpu(), plain[0])
    error_rule(found[1].cpu(), plain[1], truth[1])
    for _ in range(10):
        again = backward(grad.cuda(), layout.cu_seqlens.cuda(), *arguments)
        assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


def test_a_captured_swap_replays_on_another_layout():
    layouts = [on_gpu(spread(4, 1)) for _ in range(3)]
    tokens, new_prefix = torch.randn(layouts[0].capacity, 192).cuda(), torch.randn(19, 192).cuda()
    static = sk.SupertokenLayout(layouts[0].cu_seqlens.clone(), layouts[0].cells.clone(), (64, 64), 1)
    sk.replace_prefix(tokens, static, new_prefix)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, changed = sk.replace_prefix(tokens, static, new_prefix)
    for layout in layouts:
        static.cu_seqlens.copy_(layout.cu_seqlens)
        static.cells.copy_(layout.cells)
        tokens.normal_()
        graph.replay()
        expected, expected_layout = sk.replace_prefix(tokens, layout, new_prefix)
        assert torch.equal(out, expected) and torch.equal(changed.cells, expected_layout.cells)
        assert torch.equal(changed.cu_seqlens, expected_layout.cu_seqlens)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 11 * 2**30:
        pytest.skip("needs 11 GiB of free GPU memory")
    layout = sk.SupertokenLayout.uniform(1, (2048, 1056), num_prefix=1, device="cuda")
    tokens = torch.empty(layout.capacity, 1024, dtype=torch.bfloat16, device="cuda")
    assert tokens.numel() > 2**31
    tokens[-2:] = torch.arange(2048, device="cuda").view(2, 1024)
    new_prefix = torch.ones(3, 1024, dtype=torch.bfloat16, device="cuda")
    out, changed = sk.replace_prefix(tokens, layout, new_prefix)
    assert torch.equal(out[-2:], tokens[-2:]) and torch.equal(out[:3], new_prefix)
    assert torch.equal(changed.cells[-2:], layout.cells[-2:]) and int(changed.cu_seqlens[-1]) == len(out)
