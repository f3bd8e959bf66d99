"""rope_table and ragged_rope against rotations by hand."""

from __future__ import annotations

import pytest
import torch
from cases.rope import rotate_by_hand, table_by_hand
from layouts import AWKWARD, SPARE_ROWS, build
from tensors import LOW_PRECISION, ROW_VIEWS, close, gradients, identical, poison

import step_kernels as sk

PAIRS, WIDTH = 3, 6


def turning(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(PAIRS, 2, dtype=dtype), torch.randn(PAIRS, dtype=dtype)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_table(name: str, spare: int | None) -> None:
    plain = AWKWARD[name]
    layout, (frequencies, phases) = build(plain, spare), turning()
    for given in (phases, None):
        table = sk.rope_table(layout, frequencies, given)
        close(table, table_by_hand(plain, layout.capacity, frequencies, given))
        assert table.dtype == torch.float64 and table.is_contiguous()


def test_a_coarse_layout_has_the_table_of_its_own_grid() -> None:
    """Positions as shares of the grid (DINOv3): a supertoken is a token of the coarse grid."""

    def table(layout: sk.SupertokenLayout) -> torch.Tensor:
        periods = torch.tensor([1.0, 3.0], dtype=torch.float64)
        (rows, cols), zero = layout.grid, torch.zeros(2, dtype=torch.float64)
        down, right = torch.stack((2 / (rows * periods), zero), 1), torch.stack((zero, 2 / (cols * periods)), 1)
        phases = torch.cat([(1 / size - 1) / periods for size in (rows, cols)])
        return sk.rope_table(layout, torch.cat((down, right)), phases)

    coarse = sk.SupertokenLayout.uniform(2, (3, 5), num_prefix=2)
    for side in (1, 2, 4):
        merged = sk.SupertokenLayout.uniform(2, (3 * side, 5 * side), side=side, num_prefix=2)
        close(table(merged), table(coarse))


def test_angles_of_many_turns_keep_their_digits() -> None:
    layout = sk.SupertokenLayout.uniform(1, (1, 1000))
    frequencies = torch.tensor([[0.0, 1.0], [0.0, 0.25], [0.0, 64.125]])
    table, exact = sk.rope_table(layout, frequencies), sk.rope_table(layout, frequencies.double())
    close(table, exact, 2e-7)
    assert torch.equal(table[:, 0], torch.zeros(1000))


@pytest.mark.parametrize("rotate_half", [True, False])
@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_rotation_and_gradients(name: str, spare: int | None, rotate_half: bool) -> None:
    plain = AWKWARD[name]
    layout, live = build(plain, spare), len(plain.tokens())
    table = poison(torch.randn(layout.capacity, WIDTH, dtype=torch.float64), live)
    tensors = [torch.randn(layout.capacity, heads, WIDTH, dtype=torch.float64) for heads in (4, 2)]
    tensors = [poison(tensor, live).requires_grad_() for tensor in tensors]
    found = sk.ragged_rope(*tensors, table, rotate_half=rotate_half, layout=layout)
    for x, out in zip(tensors, found, strict=True):
        close(out, rotate_by_hand(x, table, live, rotate_half))
        assert out.is_contiguous()
        cotangent = poison(torch.randn_like(out), live)
        back = torch.cat((-table[:, :PAIRS], table[:, PAIRS:]), 1)
        close(gradients(out, [x], cotangent)[0], rotate_by_hand(cotangent, back, live, rotate_half))


def test_rows_of_prefix_tokens_stay_as_they_are() -> None:
    layout = build(AWKWARD["prefix_5"], 3)
    table = sk.rope_table(layout, turning(torch.float32)[0])
    q = torch.randn(layout.capacity, 2, WIDTH).bfloat16()
    out, _ = sk.ragged_rope(q, q, table, layout=layout)
    prefix = (layout.cells[:, 3] == 0) & (torch.arange(layout.capacity) < layout.num_tokens)
    assert prefix.any() and torch.equal(out[prefix], q[prefix])
    assert not torch.equal(out[~prefix], q[~prefix])


def test_only_one_output_may_be_used() -> None:
    q, k = (torch.randn(4, 1, WIDTH, requires_grad=True) for _ in range(2))
    table = torch.randn(4, WIDTH)
    out, _ = sk.ragged_rope(q, k, table)
    gradient, none = torch.autograd.grad(out.sum(), (q, k), allow_unused=True)
    assert gradient.abs().sum() > 0 and (none is None or not none.any())


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("view", ROW_VIEWS)
def test_views_and_dtypes(view: str, dtype: torch.dtype) -> None:
    q, k, table = torch.randn(9, 2, WIDTH).to(dtype), torch.randn(9, 1, WIDTH).to(dtype), torch.randn(9, WIDTH)
    expected = sk.ragged_rope(q, k, table)
    ours = sk.ragged_rope(ROW_VIEWS[view](q), ROW_VIEWS[view](k), ROW_VIEWS[view](table))
    for one, other, x in zip(ours, expected, (q, k), strict=True):
        assert torch.equal(one, other) and one.dtype == dtype
        close(one, rotate_by_hand(x, table, 9, False), 2 * torch.finfo(dtype).eps)


def test_views_of_one_qkv() -> None:
    layout = build(AWKWARD["prefix_5"])
    qkv = torch.randn(layout.capacity, 3, 2, WIDTH)
    q, k, _ = qkv.unbind(1)
    table = sk.rope_table(layout, *turning(torch.float32))
    identical(sk.ragged_rope(q, k, table), sk.ragged_rope(q.clone(), k.clone(), table))


@torch.no_grad()
def test_undefined_tails_have_the_same_live_rows() -> None:
    layout = build(AWKWARD["holes"], 3)
    live = layout.num_tokens
    frequencies, phases = turning(torch.float32)
    table = sk.rope_table(layout, frequencies, phases, tail="undefined")
    assert torch.equal(table[:live], sk.rope_table(layout, frequencies, phases)[:live])
    q = torch.randn(layout.capacity, 1, WIDTH)
    zero, undefined = (sk.ragged_rope(q, q, table, layout=layout, tail=tail) for tail in ("zero", "undefined"))
    identical([x[:live] for x in zero], [x[:live] for x in undefined])


GOOD = {"q": torch.zeros(9, 2, WIDTH), "k": torch.zeros(9, 2, WIDTH), "table": torch.zeros(9, WIDTH)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a tensor"),
        ({"q": torch.zeros(9, WIDTH)}, ValueError, "q: expected shape"),
        ({"k": torch.zeros(8, 2, WIDTH)}, ValueError, "k: expected shape"),
        ({"k": torch.zeros(9, 2, WIDTH).half()}, TypeError, "k: expected torch.float32 as q has"),
        (
            {"q": torch.zeros(9, 2, 5), "k": torch.zeros(9, 2, 5)},
            ValueError,
            "q: expected an even head dimension, got 5",
        ),
        ({"q": torch.zeros(9, WIDTH, 2).mT}, ValueError, "q: expected a contiguous last dimension"),
        ({"table": torch.zeros(9, 3)}, ValueError, "table: expected shape"),
        ({"table": torch.zeros(9, WIDTH).half()}, TypeError, "table: expected dtype float32"),
        ({"table": torch.zeros(9, WIDTH, device="meta")}, ValueError, "table: expected a tensor on cpu as q is"),
        (
            {"table": torch.zeros(9, WIDTH, requires_grad=True)},
            ValueError,
            "table: expected a tensor that requires no gradient",
        ),
        ({"rotate_half": "yes"}, ValueError, "rotate_half: expected one of True, False"),
        ({"layout": 3}, TypeError, "layout: expected a SupertokenLayout"),
        ({"layout": sk.SupertokenLayout.uniform(1, (2, 2))}, ValueError, "q: expected shape"),
        ({"tail": "nan"}, ValueError, "tail: expected one of"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.ragged_rope(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": None}, TypeError, "layout: expected a SupertokenLayout"),
        ({"frequencies": torch.zeros(3)}, ValueError, "frequencies: expected shape"),
        ({"frequencies": torch.zeros(3, 2).half()}, TypeError, "frequencies: expected dtype float32 or float64"),
        (
            {"frequencies": torch.zeros(3, 2, requires_grad=True)},
            ValueError,
            "frequencies: expected a tensor that requires no",
        ),
        ({"phases": torch.zeros(2)}, ValueError, "phases: expected shape"),
        ({"phases": torch.zeros(3).double()}, TypeError, "phases: expected torch.float32 as frequencies has"),
        ({"tail": None}, ValueError, "tail: expected one of"),
    ],
)
def test_bad_arguments_of_the_table(change: dict, error: type[Exception], message: str) -> None:
    good = {"layout": sk.SupertokenLayout.uniform(1, (2, 2)), "frequencies": torch.zeros(3, 2)}
    with pytest.raises(error, match=message):
        sk.rope_table(**{**good, **change})
