"""rope_table, ragged_rope and its gradient on a GPU against the CPU reference."""

import pytest
import torch
from cases.rope import table_of, with_gradients
from floors import changed, hold, reference
from gpu.syncs import capture, needs_memory, ten_runs_are_identical
from layouts import AWKWARD, SPARE_ROWS, build, mixed
from tensors import LOW_PRECISION, identical, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu


def turning(pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to a turn or two over a grid of 64 x 64."""
    return torch.randn(pairs, 2) / 64, torch.randn(pairs)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_tables_of_awkward_layouts(name, spare):
    hold(table_of, build(AWKWARD[name], spare), *turning(3), device="cuda")


@pytest.mark.parametrize("pairs", [32, 36, 128])
def test_tables_at_realistic_sizes(pairs):
    hold(table_of, mixed(8, (64, 64), 5), *turning(pairs), device="cuda")


@pytest.mark.parametrize("rotate_half", [True, False])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("heads", "width"), [(16, 64), (5, 72), (2, 256)])
def test_rotations_at_realistic_sizes(heads, width, dtype, rotate_half):
    layout = mixed(4, (64, 64), 5)
    live = int(layout.cu_seqlens[-1])
    qkv = poison(torch.randn(layout.capacity, 3, heads, width).to(dtype), live)
    q, k, _ = qkv.unbind(1)
    table = poison(reference(sk.rope_table, layout, *turning(width // 2)), live)
    cotangents = [poison(torch.randn(layout.capacity, heads, width).to(dtype), live) for _ in range(2)]
    hold(with_gradients, q, k, table, cotangents, rotate_half, layout, device="cuda")
    arguments = changed((q, k, table, cotangents, rotate_half, layout), lambda x: x.to("cuda"))
    ten_runs_are_identical(lambda: with_gradients(*arguments))


def test_batch_mates_do_not_matter():
    layout = sk.SupertokenLayout.uniform(3, (16, 16), num_prefix=1, device="cuda")
    alone = sk.SupertokenLayout.uniform(1, (16, 16), num_prefix=1, device="cuda")
    q, frequencies = torch.randn(layout.capacity, 4, 64, device="cuda"), turning(32)[0].cuda()
    together = sk.ragged_rope(q, q, sk.rope_table(layout, frequencies), layout=layout)[0]
    one = sk.ragged_rope(q[257:514], q[257:514], sk.rope_table(alone, frequencies), layout=alone)[0]
    assert torch.equal(one, together[257:514])


def test_a_captured_rotation_replays_on_another_layout():
    layouts = [mixed(2, (64, 64), 5).to("cuda") for _ in range(3)]
    static = sk.SupertokenLayout(layouts[0].cu_seqlens.clone(), layouts[0].cells.clone(), (64, 64), 5)
    q, frequencies = torch.randn(static.capacity, 4, 64, device="cuda"), turning(32)[0].cuda()

    def rotate(layout):
        return sk.ragged_rope(q, q, sk.rope_table(layout, frequencies), rotate_half=True, layout=layout)

    replay = capture(lambda: rotate(static))
    for layout in layouts:
        static.cu_seqlens.copy_(layout.cu_seqlens)
        static.cells.copy_(layout.cells)
        q.normal_()
        identical(replay(), rotate(layout))


def test_more_than_2_to_the_31_elements():
    needs_memory(22)
    rows = 2**21 + 3
    q = torch.zeros(rows, 16, 64, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    q[-2:] = torch.randn(2, 16, 64, device="cuda")
    table = torch.randn(rows, 64, device="cuda")
    out, _ = sk.ragged_rope(q, q[:, :1], table)
    expected, _ = sk.ragged_rope(q[-2:].clone(), q[-2:, :1].clone(), table[-2:].clone())
    assert torch.equal(out[-2:], expected) and not out[:2].any()
