"""rope_table, ragged_rope and its gradient on a GPU against the CPU reference."""

import pytest
import torch
from floors import reference
from gpu.syncs import no_sync
from layouts import AWKWARD, SPARE_ROWS, build
from tensors import LOW_PRECISION, error_rule, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu


def spread(batch: int) -> sk.SupertokenLayout:
    """Untrimmed, images of different lengths, five prefix tokens, on the CPU."""
    scores = [torch.randn(batch, 64 // side, 64 // side) for side in (2, 4, 8)]
    settings = {"sides": (2, 4, 8), "thresholds": 0.5, "grid": (64, 64), "num_prefix": 5}
    return reference(sk.resolve_layout, scores, **settings)


def turning(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to a turn or two over a grid of 64 x 64."""
    return torch.randn(pairs, 2) / 64, torch.randn(pairs)


def hold_table(layout, frequencies, phases):
    sk.rope_table(layout.to("cuda"), frequencies.cuda(), phases.cuda())  # compiles
    on_gpu, moved = layout.to("cuda"), (frequencies.cuda(), phases.cuda())
    with no_sync():
        ours = sk.rope_table(on_gpu, *moved)
    plain = reference(sk.rope_table, layout, frequencies, phases)
    error_rule(ours.cpu(), plain, reference(sk.rope_table, layout, frequencies.double(), phases.double()))


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_tables_of_awkward_layouts(name, spare):
    hold_table(build(AWKWARD[name], spare), *turning(3))


@pytest.mark.parametrize("pairs", [32, 36, 128])
def test_tables_at_realistic_sizes(pairs):
    hold_table(spread(8), *turning(pairs))


def run(q, k, table, cotangents, rotate_half, layout):
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = sk.ragged_rope(*leaves, table, rotate_half=rotate_half, layout=layout)
    return *(each.detach() for each in out), *torch.autograd.grad(out, leaves, cotangents)


@pytest.mark.parametrize("rotate_half", [True, False])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("heads", "width"), [(16, 64), (5, 72), (2, 256)])
def test_rotations_at_realistic_sizes(heads, width, dtype, rotate_half):
    layout = spread(4)
    live = int(layout.cu_seqlens[-1])
    qkv = poison(torch.randn(layout.capacity, 3, heads, width).to(dtype), live)
    q, k, _ = qkv.unbind(1)
    table = poison(reference(sk.rope_table, layout, *turning(width // 2)), live)
    cotangents = [poison(torch.randn(layout.capacity, heads, width).to(dtype), live) for _ in range(2)]
    plain = reference(run, q, k, table, cotangents, rotate_half, layout)
    wide = [each.double() for each in cotangents]
    exact = reference(run, q.double(), k.double(), table.double(), wide, rotate_half, layout)
    q, k, _ = qkv.cuda().unbind(1)
    arguments = q, k, table.cuda(), [each.cuda() for each in cotangents], rotate_half, layout.to("cuda")
    run(*arguments)  # compiles
    with no_sync():
        ours = run(*arguments)
    for got, peer, truth in zip(ours, plain, exact, strict=True):
        error_rule(got.cpu(), peer, truth)
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(run(*arguments), ours, strict=True))


def test_batch_mates_do_not_matter():
    layout = sk.SupertokenLayout.uniform(3, (16, 16), num_prefix=1, device="cuda")
    alone = sk.SupertokenLayout.uniform(1, (16, 16), num_prefix=1, device="cuda")
    q, frequencies = torch.randn(layout.capacity, 4, 64, device="cuda"), turning(32)[0].cuda()
    together = sk.ragged_rope(q, q, sk.rope_table(layout, frequencies), layout=layout)[0]
    one = sk.ragged_rope(q[257:514], q[257:514], sk.rope_table(alone, frequencies), layout=alone)[0]
    assert torch.equal(one, together[257:514])


def test_a_captured_rotation_replays_on_another_layout():
    layouts = [spread(2).to("cuda") for _ in range(3)]
    static = sk.SupertokenLayout(layouts[0].cu_seqlens.clone(), layouts[0].cells.clone(), (64, 64), 5)
    q, frequencies = torch.randn(static.capacity, 4, 64, device="cuda"), turning(32)[0].cuda()

    def rotate(layout):
        return sk.ragged_rope(q, q, sk.rope_table(layout, frequencies), rotate_half=True, layout=layout)

    rotate(static)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rotate(static)
    for layout in layouts:
        static.cu_seqlens.copy_(layout.cu_seqlens)
        static.cells.copy_(layout.cells)
        q.normal_()
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, rotate(layout), strict=True))


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB of free GPU memory")
    rows = 2**21 + 3
    q = torch.zeros(rows, 16, 64, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    q[-2:] = torch.randn(2, 16, 64, device="cuda")
    table = torch.randn(rows, 64, device="cuda")
    out, _ = sk.ragged_rope(q, q[:, :1], table)
    expected, _ = sk.ragged_rope(q[-2:].clone(), q[-2:, :1].clone(), table[-2:].clone())
    assert torch.equal(out[-2:], expected) and not out[:2].any()
