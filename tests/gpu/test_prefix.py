"""replace_prefix and its gradients on a GPU against the CPU reference."""

import pytest
import torch
from floors import reference
from gpu.syncs import capture, needs_memory, no_sync, ten_runs_are_identical
from layouts import AWKWARD, SPARE_ROWS, build, mixed, same_layout
from tensors import LOW_PRECISION, error_rule, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu


def without_sync(function, *arguments, **named):
    with no_sync():
        return function(*arguments, **named)


def assert_same(ours, expected) -> None:
    assert torch.equal(ours[0].cpu(), expected[0].cpu())
    same_layout(ours[1], expected[1])


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_awkward_layouts(name, spare):
    layout, live = build(AWKWARD[name], spare), len(AWKWARD[name].tokens())
    tokens = poison(torch.randn(layout.capacity, 5), live)
    for shape in ((0, 5), (1, 5), (6, 5), (layout.batch_size, 6, 5)):
        new_prefix = torch.randn(shape)
        ours = without_sync(sk.replace_prefix, tokens.cuda(), layout.to("cuda"), new_prefix.cuda())
        assert_same(ours, reference(sk.replace_prefix, tokens, layout, new_prefix))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("num_prefix", "new"), ((1, 150), (5, 0), (0, 19)))
@pytest.mark.parametrize("width", (1024, 192, 197))
@pytest.mark.parametrize("per_image", (False, True))
def test_values_and_gradients_at_realistic_sizes(num_prefix, new, width, per_image, dtype):
    layout = mixed(8, (64, 64), num_prefix)
    tokens = poison(torch.randn(layout.capacity, width).to(dtype), int(layout.cu_seqlens[-1]))
    new_prefix = torch.randn((8, new, width) if per_image else (new, width)).to(dtype)
    ours = without_sync(sk.replace_prefix, tokens.cuda(), layout.to("cuda"), new_prefix.cuda())
    assert_same(ours, reference(sk.replace_prefix, tokens, layout, new_prefix))

    backward = torch.ops.step_kernels.replace_prefix_backward
    grad = poison(torch.randn(ours[0].shape).to(dtype), int(ours[1].cu_seqlens[-1]))
    arguments = layout.capacity, new, num_prefix, per_image
    found = without_sync(backward, grad.cuda(), layout.cu_seqlens.cuda(), *arguments)
    plain = reference(backward, grad, layout.cu_seqlens, *arguments)
    truth = reference(backward, grad.double(), layout.cu_seqlens, *arguments)
    assert torch.equal(found[0].cpu(), plain[0])
    error_rule(found[1].cpu(), plain[1], truth[1])
    grad, cu_seqlens = grad.cuda(), layout.cu_seqlens.cuda()
    ten_runs_are_identical(lambda: backward(grad, cu_seqlens, *arguments))


def test_a_captured_swap_replays_on_another_layout():
    layouts = [mixed(4, (64, 64)).to("cuda") for _ in range(3)]
    tokens, new_prefix = torch.randn(layouts[0].capacity, 192).cuda(), torch.randn(19, 192).cuda()
    static = sk.SupertokenLayout(layouts[0].cu_seqlens.clone(), layouts[0].cells.clone(), (64, 64), 1)
    replay = capture(lambda: sk.replace_prefix(tokens, static, new_prefix))
    for layout in layouts:
        static.cu_seqlens.copy_(layout.cu_seqlens)
        static.cells.copy_(layout.cells)
        tokens.normal_()
        assert_same(replay(), sk.replace_prefix(tokens, layout, new_prefix))


def test_more_than_2_to_the_31_elements():
    needs_memory(11)
    layout = sk.SupertokenLayout.uniform(1, (2048, 1056), num_prefix=1, device="cuda")
    tokens = torch.empty(layout.capacity, 1024, dtype=torch.bfloat16, device="cuda")
    assert tokens.numel() > 2**31
    tokens[-2:] = torch.arange(2048, device="cuda").view(2, 1024)
    new_prefix = torch.ones(3, 1024, dtype=torch.bfloat16, device="cuda")
    out, changed = sk.replace_prefix(tokens, layout, new_prefix)
    assert torch.equal(out[-2:], tokens[-2:]) and torch.equal(out[:3], new_prefix)
    assert torch.equal(changed.cells[-2:], layout.cells[-2:]) and int(changed.cu_seqlens[-1]) == len(out)
