"""SupertokenLayout, resolve_layout and replace_prefix against loops over cells."""

from __future__ import annotations

import dataclasses
import io

import brute_force
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build, read
from random_layouts import plain_layouts
from tensors import gradients, poison

import step_kernels as sk


@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_properties(name: str, spare: int | None) -> None:
    plain = AWKWARD[name]
    layout = build(plain, spare)
    live = len(plain.tokens())
    assert layout.batch_size == len(plain.images)
    assert layout.capacity == layout.cells.shape[0]
    assert layout.num_tokens == live and isinstance(layout.num_tokens, int)
    assert layout.max_seqlen == plain.num_prefix + plain.grid[0] * plain.grid[1]
    assert layout.device == layout.cells.device
    lengths = layout.lengths()
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [plain.num_prefix + len(blocks) for blocks in plain.images]
    trimmed = layout.trim()
    assert trimmed.trimmed and trimmed.capacity == live
    assert read(trimmed) == plain
    assert torch.equal(layout.sides(), brute_force.sides(plain)) and layout.sides().dtype == torch.int32


def test_frozen() -> None:
    layout = sk.SupertokenLayout.uniform(1, (2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.num_prefix = 3  # type: ignore[misc]


def test_equality_is_that_of_values() -> None:
    layout = build(AWKWARD["prefix_5"], spare=3)
    hinted = dataclasses.replace(layout, expected_tokens=7)
    assert layout == layout and layout == hinted.clone() and layout.equal(hinted) and hash(layout) == hash(hinted)
    trimmed = layout.trim()
    moved = layout.clone()
    moved.cells[5, 1] += 1
    for other in (trimmed, moved, dataclasses.replace(layout, num_prefix=4), build(AWKWARD["ragged_3x5"], spare=3)):
        assert layout != other and not layout.equal(other)
    assert trimmed == dataclasses.replace(trimmed, trimmed=False), "what the host knows of it does not matter"
    assert layout != layout.cells.tolist() and layout in [trimmed, hinted]
    with pytest.raises(TypeError, match="other: expected a SupertokenLayout, got"):
        layout.equal(layout.cells)  # type: ignore[arg-type]


def test_repr_is_one_line() -> None:
    sides = torch.ones(2, 4, 8, dtype=torch.int32)
    sides[0, :, :4], sides[0, :, 4:6] = 4, 2
    layout = sk.SupertokenLayout.from_sides(sides)
    assert repr(layout) == "SupertokenLayout(2 images, grid 4x8, tokens 11+32, capacity 64)"
    assert repr(layout.trim()) == "SupertokenLayout(2 images, grid 4x8, tokens 11+32, trimmed)"
    many = sk.SupertokenLayout.uniform(9, (1, 3), num_prefix=1)
    assert repr(many) == "SupertokenLayout(9 images, grid 1x3, prefix 1, tokens 36, trimmed)"
    assert repr(many.image(0)) == "SupertokenLayout(1 image, grid 1x3, prefix 1, tokens 4, trimmed)"
    unknown = sk.SupertokenLayout.uniform(2, (1, 3), device="meta")  # as on a GPU: no value is read
    assert repr(unknown) == "SupertokenLayout(2 images, grid 1x3, capacity 6, trimmed, meta)"
    tokens = torch.randn(many.capacity, 5)
    halting = sk.halt_tokens(tokens, many, 0.0, canvas=torch.zeros(9, 5, 1, 3))
    assert repr(halting) == (
        "Halting(27 halted of 36 rows, layout SupertokenLayout(9 images, grid 1x3, prefix 1, tokens 9, capacity 36), canvas [9, 5, 1, 3])"
    )


def test_num_tokens_is_read_anew_each_time() -> None:
    """A cached count would go stale when a captured graph is replayed with other decisions."""
    layout = build(AWKWARD["ragged_3x5"], spare=3)
    before = layout.num_tokens
    layout.cu_seqlens[-1] -= 2
    assert layout.num_tokens == before - 2


def test_expected_tokens() -> None:
    layout = build(AWKWARD["prefix_5"], spare=3)
    assert layout.expected_tokens is None
    for count in (0, 7, 10**12, np.int64(7)):
        hinted = dataclasses.replace(layout, expected_tokens=count)
        assert hinted.expected_tokens == hinted.to("cpu").expected_tokens == hinted.clone().expected_tokens == count
        assert type(hinted.expected_tokens) is int
        assert hinted.trim().expected_tokens is None, "the count of a trimmed layout is known"


def test_a_hint_is_for_one_stage_only() -> None:
    """After an exit, or with other prefix tokens, the count is another one."""
    layout = dataclasses.replace(build(AWKWARD["prefix_5"], spare=3), expected_tokens=7)
    tokens = torch.randn(layout.capacity, 4)
    assert sk.halt_tokens(tokens, layout, 0.5).layout.expected_tokens is None
    fewer = dataclasses.replace(layout, expected_tokens=5 * layout.batch_size + 1)  # prefix tokens and one more
    assert sk.replace_prefix(tokens, fewer, tokens[:2])[1].expected_tokens == 2 * layout.batch_size + 1
    assert sk.replace_prefix(tokens, layout, tokens[:0])[1].expected_tokens == max(0, 7 - 5 * layout.batch_size)


def test_layouts_saved_before_there_were_hints_load() -> None:
    layout = build(AWKWARD["prefix_5"], spare=3)
    object.__delattr__(layout, "expected_tokens")
    file = io.BytesIO()
    torch.save(layout, file)
    assert b"expected_tokens" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.expected_tokens is None and loaded.to("cpu").expected_tokens is None


def test_sizes_of_numpy_become_ints() -> None:
    """torch.load's default refuses numpy's own."""
    size = {"num_prefix": np.int64(1)}
    uniform = sk.SupertokenLayout.uniform(1, (np.int64(2), np.int64(2)), **size)
    resolved = sk.resolve_layout([torch.zeros(1, 1, 1)], sides=[2], thresholds=0.5, grid=(2, 2), **size)
    by_hand = sk.SupertokenLayout(uniform.cu_seqlens, uniform.cells, uniform.grid, **size)
    for layout in (uniform, resolved, by_hand, sk.SupertokenLayout.from_sides(torch.ones(1, 2, 2).int(), **size)):
        assert [type(number) for number in (*layout.grid, layout.num_prefix)] == [int] * 3


@pytest.mark.parametrize("num_prefix", (0, 1, 5))
@pytest.mark.parametrize("side", (1, 2, 4))
@pytest.mark.parametrize("batch", (0, 1, 3))
def test_uniform(batch: int, side: int, num_prefix: int) -> None:
    layout = sk.SupertokenLayout.uniform(batch, (4, 8), side=side, num_prefix=num_prefix)
    blocks = tuple((row, column, side) for row in range(0, 4, side) for column in range(0, 8, side))
    assert layout.trimmed
    assert read(layout) == PlainLayout((blocks,) * batch, (4, 8), num_prefix)


@pytest.mark.parametrize("grid, side", [((3, 4), 2), ((4, 3), 2), ((4, 4), 8), ((1, 1), 2)])
def test_uniform_refuses_a_grid_that_the_side_does_not_divide(grid: tuple[int, int], side: int) -> None:
    with pytest.raises(ValueError, match=str(side)):
        sk.SupertokenLayout.uniform(1, grid, side=side)


@given(plain_layouts(max_rows=17, max_columns=20))
def test_from_sides_is_the_inverse_of_sides(plain: PlainLayout) -> None:
    sides = brute_force.sides(plain)
    layout = sk.SupertokenLayout.from_sides(sides, num_prefix=plain.num_prefix)
    assert not layout.trimmed
    assert layout.capacity == len(plain.images) * (plain.num_prefix + plain.grid[0] * plain.grid[1])
    assert read(layout) == plain
    assert torch.equal(layout.sides(), sides)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32, torch.int64))
def test_from_sides_takes_any_integers_of_any_strides(dtype: torch.dtype) -> None:
    plain = AWKWARD["ragged_3x5"]
    sides = brute_force.sides(plain).to(dtype).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert read(sk.SupertokenLayout.from_sides(sides)) == plain


def test_from_sides_largest_block() -> None:
    layout = sk.SupertokenLayout.from_sides(torch.full((1, 64, 128), 64, dtype=torch.int32))
    assert read(layout).images == (((0, 0, 64), (0, 64, 64)),)


@pytest.mark.parametrize(
    "sides, cell",
    [
        ([[1, 1, 1], [1, 1, 1], [1, 1, 2]], (2, 2)),  # leaves the grid
        ([[1, 3, 1], [1, 1, 1], [1, 1, 1]], (0, 1)),  # no power of two
        ([[1, 1, 1], [-1, 1, 1], [1, 1, 1]], (1, 0)),
        ([[1, 1, 1], [1, 1, 128], [1, 1, 1]], (1, 2)),
        ([[2, 2, 1], [2, 2, 2], [1, 1, 1]], (1, 2)),  # nothing else of its block
    ],
)
def test_from_sides_names_the_first_inconsistent_cell(sides: list[list[int]], cell: tuple[int, int]) -> None:
    good = torch.ones(3, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"image 1\D+{cell[0]}\D+{cell[1]}\D"):
        sk.SupertokenLayout.from_sides(torch.stack([good, torch.tensor(sides, dtype=torch.int32)]))


def test_from_sides_refuses_a_block_with_a_hole() -> None:
    for row in range(2):
        for column in range(2):
            sides = torch.full((1, 2, 2), 2, dtype=torch.int32)
            sides[0, row, column] = 1
            with pytest.raises(ValueError, match="image 0"):
                sk.SupertokenLayout.from_sides(sides)


# Some equal a threshold; 0.1 is not the same number in fp32 and fp64.
SCORES = (0.0, 0.1, 0.25, 0.5, 0.75, float("nan"), float("inf"), -float("inf"))


@given(
    st.data(),
    st.integers(0, 3),
    st.tuples(st.integers(1, 17), st.integers(1, 17)),
    st.permutations([2, 4, 8, 16]),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([0, 1, 5]),
)
def test_resolve_layout(
    data: st.DataObject,
    batch: int,
    grid: tuple[int, int],
    order: list[int],
    levels: int,
    dtype: torch.dtype,
    num_prefix: int,
) -> None:
    sides = order[:levels]
    thresholds = [data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5])) for _ in sides]
    random = data.draw(st.randoms(use_true_random=False))
    scores = []
    for side in sides:
        shape = (batch, grid[0] // side, grid[1] // side)
        count = shape[0] * shape[1] * shape[2]
        scores.append(torch.tensor([random.choice(SCORES) for _ in range(count)], dtype=dtype).reshape(shape))
    mixed = [torch.tensor(value) if index % 2 else value for index, value in enumerate(thresholds)]
    expected = brute_force.resolve(scores, sides, thresholds, grid)
    layout = sk.resolve_layout(scores, sides=sides, thresholds=mixed, grid=grid, num_prefix=num_prefix)
    assert not layout.trimmed
    assert layout.capacity == batch * (num_prefix + grid[0] * grid[1])
    assert read(layout) == PlainLayout(expected.images, grid, num_prefix)


def test_resolve_layout_compares_in_single_precision() -> None:
    """0.1 + 1e-12 and 0.1 are one number in fp32; 0.1 in bf16 is another one."""
    for score, taken in [(0.1 + 1e-12, False), (0.1 + 1e-6, True)]:
        scores = [torch.full((1, 1, 1), score, dtype=torch.float64)]
        layout = sk.resolve_layout(scores, sides=(2,), thresholds=(0.1,), grid=(2, 2))
        assert layout.num_tokens == (1 if taken else 4), score
    low = torch.full((1, 1, 1), 0.1, dtype=torch.bfloat16)
    layout = sk.resolve_layout([low], sides=(2,), thresholds=(0.1,), grid=(2, 2))
    assert layout.num_tokens == (1 if float(low) > 0.1 else 4)


def test_resolve_layout_takes_strided_scores() -> None:
    scores = torch.rand(6, 4, 3)
    strided = [scores.permute(1, 2, 0)[:, ::2, ::3], scores[:4, :1, :1]]
    plain = [strided[0].contiguous(), strided[1].contiguous()]
    layouts = [sk.resolve_layout(s, sides=(2, 4), thresholds=(0.5, 0.6), grid=(4, 5)) for s in (strided, plain)]
    assert read(layouts[0]) == read(layouts[1])


@given(plain_layouts(), st.sampled_from([0, 1, 4]), st.sampled_from(SPARE_ROWS), st.booleans())
def test_replace_prefix(plain: PlainLayout, new_count: int, spare: int | None, per_image: bool) -> None:
    layout = build(plain, spare)
    live = layout.num_tokens
    tokens = poison(torch.randn(layout.capacity, 3, dtype=torch.float64), live).requires_grad_()
    shape = (len(plain.images), new_count, 3) if per_image else (new_count, 3)
    new_prefix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    result, changed = sk.replace_prefix(tokens, layout, new_prefix)
    expected = brute_force.replace_prefix(tokens, plain, new_prefix)
    assert read(changed) == PlainLayout(plain.images, plain.grid, new_count)
    assert changed.trimmed == layout.trimmed
    assert result.shape == (changed.capacity, 3)
    assert torch.equal(result[: len(expected)], expected)
    assert not result[len(expected) :].any()
    cotangent = poison(torch.randn_like(result), len(expected))
    found = gradients(result, [tokens, new_prefix], cotangent)
    truth = gradients(expected, [tokens, new_prefix], cotangent[: len(expected)])
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


GOOD = {"sides": (2,), "thresholds": (0.5,), "grid": (4, 4)}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"sides": (3,)}, ValueError, ["sides", "3"]),
        ({"sides": (128,)}, ValueError, ["sides", "128"]),
        ({"sides": (2, 2)}, ValueError, ["sides"]),
        ({"sides": ()}, TypeError, ["sides"]),
        ({"sides": 2}, TypeError, ["sides"]),
        ({"sides": [[2]]}, TypeError, ["sides"]),
        ({"sides": (2, 4)}, ValueError, ["1", "2"]),
        ({"thresholds": (0.5, 0.5)}, ValueError, ["thresholds", "2"]),
        ({"thresholds": ("x",)}, TypeError, ["thresholds", "x"]),
        ({"thresholds": (torch.zeros(2),)}, ValueError, ["thresholds", "2"]),
        ({"grid": (5, 8)}, ValueError, ["scores", "2, 4"]),
        ({"grid": (0, 4)}, ValueError, ["grid", "0"]),
        ({"grid": 4}, TypeError, ["grid", "4"]),
        ({"num_prefix": -1}, ValueError, ["num_prefix", "-1"]),
        ({"scores": [torch.zeros(1, 2, 2, dtype=torch.int64)]}, TypeError, ["scores", "int64"]),
        ({"scores": [torch.zeros(2, 2)]}, ValueError, ["scores", "2, 2"]),
        ({"scores": ["no"]}, TypeError, ["scores", "no"]),
    ],
)
def test_resolve_layout_names_what_is_wrong(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {"scores": [torch.zeros(1, 2, 2)], **GOOD, **change}
    with pytest.raises(error) as caught:
        sk.resolve_layout(arguments.pop("scores"), **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: sk.SupertokenLayout.uniform(-1, (2, 2)), ValueError, ["batch_size", "-1"]),
        (lambda: sk.SupertokenLayout.uniform(1, (2, 2), side=3), ValueError, ["side", "3"]),
        (lambda: sk.SupertokenLayout.uniform(1, (2, 2), num_prefix=-2), ValueError, ["num_prefix", "-2"]),
        (lambda: sk.SupertokenLayout.from_sides(torch.ones(1, 2, 2)), TypeError, ["sides", "float32"]),
        (lambda: sk.SupertokenLayout.from_sides(torch.ones(2, 2, dtype=torch.int32)), ValueError, ["sides", "2, 2"]),
        (lambda: sk.SupertokenLayout.from_sides([[1]]), TypeError, ["sides", "list"]),  # type: ignore[arg-type]
        (
            lambda: sk.SupertokenLayout(torch.arange(4, dtype=torch.int32)[::2], torch.zeros(2, 4).int(), (2, 2)),
            ValueError,
            ["cu_seqlens", "contiguous", "[2]"],
        ),
        (
            lambda: sk.SupertokenLayout(torch.zeros(2).int(), torch.zeros(4, 3).int().T, (2, 2)),
            ValueError,
            ["cells", "contiguous", "[1, 3]"],
        ),
        (
            lambda: dataclasses.replace(sk.SupertokenLayout.uniform(1, (2, 2)), cu_seqlens=torch.tensor([0, 3]).int()),
            ValueError,
            ["trimmed", "4", "3"],
        ),
        (
            lambda: dataclasses.replace(sk.SupertokenLayout.uniform(1, (2, 2)), num_prefix=5),
            ValueError,
            ["cu_seqlens", "num_prefix = 5", "4 for image 0"],
        ),
        (
            lambda: dataclasses.replace(sk.SupertokenLayout.uniform(1, (2, 2)), expected_tokens=-1),
            ValueError,
            ["expected_tokens", "at least 0", "-1"],
        ),
        (
            lambda: dataclasses.replace(sk.SupertokenLayout.uniform(1, (2, 2)), expected_tokens=torch.tensor(3)),
            TypeError,
            ["expected_tokens", "an int", "int64"],
        ),
        (
            lambda: sk.replace_prefix(torch.zeros(3, 4), sk.SupertokenLayout.uniform(1, (2, 2)), torch.zeros(1, 4)),
            ValueError,
            ["tokens", "4", "3"],
        ),
        (
            lambda: sk.replace_prefix(torch.zeros(4, 4), sk.SupertokenLayout.uniform(1, (2, 2)), torch.zeros(1, 5)),
            ValueError,
            ["new_prefix", "4", "5"],
        ),
        (
            lambda: sk.replace_prefix(torch.zeros(8, 4), sk.SupertokenLayout.uniform(2, (2, 2)), torch.zeros(1, 3, 4)),
            ValueError,
            ["new_prefix", "[2, P, 4]", "[1, 3, 4]"],
        ),
        (
            lambda: sk.replace_prefix(torch.zeros(8, 4), sk.SupertokenLayout.uniform(2, (2, 2)), torch.zeros(4)),
            ValueError,
            ["new_prefix", "[P, 4]", "[2, P, 4]", "[4]"],
        ),
        (
            lambda: sk.replace_prefix(
                torch.zeros(8, 4), sk.SupertokenLayout.uniform(2, (2, 2)), torch.zeros(2, 3, 4).half()
            ),
            TypeError,
            ["new_prefix", "float32", "float16"],
        ),
    ],
)
def test_construction_names_what_is_wrong(call, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_to_takes_a_device_only() -> None:
    layout = sk.SupertokenLayout.uniform(1, (2, 2))
    assert layout.to("meta").device.type == "meta" and layout.to(torch.device("cpu")).device.type == "cpu"
    for other in (torch.float16, torch.zeros(1, dtype=torch.float16)):
        with pytest.raises((TypeError, RuntimeError, AttributeError)):
            layout.to(other)
