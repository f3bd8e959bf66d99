"""scatter_back and scatter_into against loops over cells: data movement, so bit for bit."""

from __future__ import annotations

import brute_force
import pytest
import torch
from floors import refused
from hypothesis import given
from hypothesis import strategies as st
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build
from random_layouts import plain_layouts
from tensors import IMAGE_VIEWS, LOW_PRECISION, ROW_VIEWS, close, error_rule, gradients, poison
from torch import Tensor

import step_kernels as sk

DTYPES = (*LOW_PRECISION, torch.float64)


def make_values(plain: PlainLayout, capacity: int, channels: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values whose prefix and tail rows are NaN, since nobody may read them."""
    live = len(plain.tokens())
    values = poison(torch.randn(capacity, channels, dtype=torch.float64).to(dtype), live)
    for index, token in enumerate(plain.tokens()):
        if token.side == 0:
            values[index] = float("nan")
    return values


def make_where(plain: PlainLayout, capacity: int) -> tuple[Tensor, list[bool]]:
    """A random selection; prefix and tail rows are selected too, and must not be scattered."""
    where = torch.rand(capacity) < 0.5
    where[len(plain.tokens()) :] = True
    for index, token in enumerate(plain.tokens()):
        if token.side == 0:
            where[index] = True
    return where, where[: len(plain.tokens())].tolist()


def make_canvas(plain: PlainLayout, channels: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(len(plain.images), channels, *plain.grid, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selected", (False, True))
@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_forward(name: str, spare: int | None, selected: bool, dtype: torch.dtype) -> None:
    plain = AWKWARD[name]
    layout = build(plain, spare)
    values = make_values(plain, layout.capacity, dtype=dtype)
    where, chosen = make_where(plain, layout.capacity) if selected else (None, None)
    zeros = torch.zeros_like(make_canvas(plain, dtype=dtype))
    result = sk.scatter_back(values, layout, where=where)
    assert torch.equal(result, brute_force.scatter_into(zeros, values, plain, chosen))
    assert result.is_contiguous(memory_format=torch.channels_last)
    canvas = make_canvas(plain, dtype=dtype)
    expected = brute_force.scatter_into(canvas.clone(), values, plain, chosen)
    sk.scatter_into(canvas, values, layout, where=where)
    assert torch.equal(canvas, expected)


@pytest.mark.parametrize("selected", (False, True))
@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_backward(name: str, spare: int | None, selected: bool) -> None:
    plain = AWKWARD[name]
    layout = build(plain, spare)
    values = make_values(plain, layout.capacity).requires_grad_()
    where, chosen = make_where(plain, layout.capacity) if selected else (None, None)
    result = sk.scatter_back(values, layout, where=where)
    truth = brute_force.scatter_into(torch.zeros_like(result), values, plain, chosen)
    cotangent = torch.randn_like(result)
    found = gradients(result, [values], cotangent)[0]
    close(found, gradients(truth, [values], cotangent)[0])
    assert not found[len(plain.tokens()) :].any()


@given(plain_layouts(), st.sampled_from(SPARE_ROWS), st.booleans())
def test_generated_layouts(plain: PlainLayout, spare: int | None, selected: bool) -> None:
    layout = build(plain, spare)
    values = make_values(plain, layout.capacity)
    where, chosen = make_where(plain, layout.capacity) if selected else (None, None)
    canvas = make_canvas(plain)
    expected = brute_force.scatter_into(canvas.clone(), values, plain, chosen)
    zeros = torch.zeros_like(canvas)
    assert torch.equal(
        sk.scatter_back(values, layout, where=where), brute_force.scatter_into(zeros, values, plain, chosen)
    )
    sk.scatter_into(canvas, values, layout, where=where)
    assert torch.equal(canvas, expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_gradient(dtype: torch.dtype) -> None:
    """A token's gradient sums over up to 256 cells."""
    plain = AWKWARD["all_sides_16"]
    layout = build(plain)
    values = torch.randn(layout.capacity, 4).to(dtype).requires_grad_()
    exact = values.detach().double().requires_grad_()
    cotangent = torch.randn(make_canvas(plain).shape).to(dtype)
    found = gradients(sk.scatter_back(values, layout), [values], cotangent)[0]
    zeros = torch.zeros(cotangent.shape, dtype=torch.float64)
    truth = gradients(brute_force.scatter_into(zeros, exact, plain), [exact], cotangent.double())[0]
    rival = torch.zeros_like(values)
    for index, (image, row, column, side) in enumerate(plain.tokens()):
        rival[index] = cotangent[image, :, row : row + side, column : column + side].sum(dim=(1, 2))
    error_rule(found, rival, truth)


@pytest.mark.parametrize("view", IMAGE_VIEWS)
def test_canvas_of_any_strides(view: str) -> None:
    """Nothing but the covered cells changes, in the canvas and in the memory around it."""
    plain = AWKWARD["holes"]
    layout = build(plain, 3)
    values = make_values(plain, layout.capacity)
    canvas = IMAGE_VIEWS[view](make_canvas(plain))
    memory = torch.as_strided(canvas, (canvas.untyped_storage().nbytes() // 8,), (1,), 0)
    addresses = torch.as_strided(torch.arange(len(memory)), canvas.shape, canvas.stride(), canvas.storage_offset())
    before = memory.clone()
    expected = brute_force.scatter_into(canvas.clone(), values, plain)
    sk.scatter_into(canvas, values, layout)
    assert torch.equal(canvas, expected)
    before[addresses.flatten()] = expected.flatten()
    assert torch.equal(memory.nan_to_num(-7.0), before.nan_to_num(-7.0))


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_value_strides(view: str) -> None:
    plain = AWKWARD["holes"]
    layout = build(plain)
    values = make_values(plain, layout.capacity)
    where, _ = make_where(plain, layout.capacity)
    wide = torch.stack([where, ~where], 1)[:, 0]
    assert not wide.is_contiguous()
    assert torch.equal(
        sk.scatter_back(ROW_VIEWS[view](values), layout, where=wide), sk.scatter_back(values, layout, where=where)
    )


def test_gradient_arrives_in_any_strides() -> None:
    plain = AWKWARD["tall_8x3"]
    layout = build(plain)
    values = make_values(plain, layout.capacity).requires_grad_()
    cotangent = torch.randn_like(make_canvas(plain))
    truth = gradients(sk.scatter_back(values, layout), [values], cotangent)[0]
    for view in (*IMAGE_VIEWS.values(), lambda c: c[:, :1].expand_as(c)):
        strided = view(cotangent)
        plain_copy = strided.clone(memory_format=torch.contiguous_format)
        found = gradients(sk.scatter_back(values, layout), [values], strided)[0]
        close(found, gradients(sk.scatter_back(values, layout), [values], plain_copy)[0])
    assert truth.isfinite().all()


@pytest.mark.parametrize("canvas_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_converted_to_the_dtype_of_the_canvas(dtype: torch.dtype, canvas_dtype: torch.dtype) -> None:
    plain = AWKWARD["holes"]
    layout = build(plain, 3)
    values, canvas = make_values(plain, layout.capacity, dtype=dtype), make_canvas(plain, dtype=canvas_dtype)
    expected = brute_force.scatter_into(canvas.clone(), values.to(canvas_dtype), plain)
    assert sk.scatter_into(canvas, values, layout) is canvas
    assert torch.equal(canvas, expected)


def test_scatter_into_refuses_gradients() -> None:
    plain = AWKWARD["ragged_3x5"]
    layout = build(plain)
    values, canvas = make_values(plain, layout.capacity), make_canvas(plain)
    with pytest.raises(ValueError, match=r"values.*gradient"):
        sk.scatter_into(canvas, values.clone().requires_grad_(), layout)
    with pytest.raises(ValueError, match=r"canvas.*gradient"):
        sk.scatter_into(canvas.clone().requires_grad_(), values, layout)
    with torch.no_grad():
        sk.scatter_into(canvas, values.clone().requires_grad_(), layout)


LAYOUT = PlainLayout((((0, 0, 2), (0, 2, 1), (1, 2, 1)),), (2, 3))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"values": "x"}, TypeError, ["values", "x"]),
        ({"values": torch.zeros(4, 5)}, ValueError, ["values", "3", "4, 5"]),
        ({"values": torch.zeros(3)}, ValueError, ["values", "3"]),
        ({"values": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, ["values", "int32"]),
        ({"values": torch.zeros(5, 3).T}, ValueError, ["values", "contiguous"]),
        ({"layout": "x"}, TypeError, ["layout", "x"]),
        ({"where": torch.zeros(3)}, TypeError, ["where", "bool", "float32"]),
        ({"where": torch.zeros(2, dtype=torch.bool)}, ValueError, ["where", "3", "2"]),
        ({"where": [True]}, TypeError, ["where", "list"]),
        ({"canvas": torch.zeros(1, 5, 3, 2)}, ValueError, ["canvas", "1, 5, 3, 2"]),
        ({"canvas": torch.zeros(2, 5, 2, 3)}, ValueError, ["canvas", "2, 5, 2, 3"]),
        ({"canvas": torch.zeros(1, 4, 2, 3)}, ValueError, ["canvas", "1, 4, 2, 3"]),
        ({"canvas": torch.zeros(1, 5, 2, 3, dtype=torch.int32)}, TypeError, ["canvas", "int32"]),
        ({"canvas": torch.zeros(1, 1, 2, 3).expand(1, 5, 2, 3)}, ValueError, ["canvas", "strides"]),
        ({"canvas": None}, TypeError, ["canvas", "None"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {"canvas": torch.zeros(1, 5, 2, 3), "values": torch.zeros(3, 5), "layout": build(LAYOUT), **change}
    calls = [lambda: sk.scatter_into(**arguments)]
    if "canvas" not in change:
        without = {name: value for name, value in arguments.items() if name != "canvas"}
        calls.append(lambda: sk.scatter_back(**without))
    for call in calls:
        with refused(error, words):
            call()
