"""replace_prefix and its gradients as kernels, against the reference."""

import math
from functools import partial

import pytest
import torch
from floors import reference
from interpreter import supervision
from layouts import AWKWARD, SPARE_ROWS, build, same_layout
from tensors import LOW_PRECISION, ROW_VIEWS, error_rule, new_memory_is_nan, poison

import step_kernels as sk
from step_kernels.triton import prefix

WIDTH = 5


def prepared(
    name: str, spare: int | None, dtype: torch.dtype = torch.float32
) -> tuple[sk.SupertokenLayout, torch.Tensor]:
    """A layout, and tokens with NaN past the live rows; so are its cells there, as far as integers go."""
    plain = AWKWARD[name]
    layout, live = build(plain, spare), len(plain.tokens())
    object.__setattr__(layout, "cells", poison(layout.cells, live))
    return layout, poison(torch.randn(layout.capacity, WIDTH).to(dtype), live)


def assert_same(ours, expected) -> None:
    (tokens, layout), (expected_tokens, expected_layout) = ours, expected
    assert torch.equal(tokens, expected_tokens) and tokens.stride() == expected_tokens.stride()
    same_layout(layout, expected_layout)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_rows_are_those_of_the_reference(name, spare, kernels):
    supervision.shuffle_programs(1)
    layout, tokens = prepared(name, spare)
    for shape in ((0, WIDTH), (1, WIDTH), (6, WIDTH), (layout.batch_size, 0, WIDTH), (layout.batch_size, 6, WIDTH)):
        new_prefix = torch.randn(shape)
        kernels.clear()
        ours = sk.replace_prefix(tokens, layout, new_prefix)
        assert kernels == ["swap_prefix_kernel"]
        assert_same(ours, reference(sk.replace_prefix, tokens, layout, new_prefix))


@pytest.mark.parametrize("name", ("prefix_5", "image_emptied", "first_and_last_emptied", "all_halted", "holes"))
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("new", (0, 1, 6))
def test_small_programs(name, dtype, new, monkeypatch):
    monkeypatch.setattr(prefix, "ELEMENTS", 8)
    monkeypatch.setattr(prefix, "COLUMNS", 2)
    layout, tokens = prepared(name, 3, dtype)
    for shape in ((new, WIDTH), (layout.batch_size, new, WIDTH)):
        new_prefix = torch.randn(shape).to(dtype)
        expected = reference(sk.replace_prefix, tokens, layout, new_prefix)
        assert_same(sk.replace_prefix(tokens, layout, new_prefix), expected)


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_tokens_and_prefix_of_any_strides(view):
    layout, tokens = prepared("prefix_5", 3)
    images = layout.batch_size
    for new_prefix in (
        torch.randn(WIDTH, 3).T,
        torch.randn(1, WIDTH).expand(4, WIDTH),
        torch.randn(WIDTH, images, 3).permute(1, 2, 0),
        torch.randn(images, 1, WIDTH).expand(-1, 4, -1),
        torch.randn(1, 4, WIDTH).expand(images, -1, -1),
        torch.randn(3, images, 2 * WIDTH)[..., ::2].transpose(0, 1),
    ):
        expected = reference(sk.replace_prefix, tokens, layout, new_prefix)
        assert_same(sk.replace_prefix(ROW_VIEWS[view](tokens), layout, new_prefix), expected)


def test_an_undefined_tail_is_left_alone():
    layout, tokens = prepared("holes", None)
    new_prefix = torch.randn(2, WIDTH)
    with new_memory_is_nan():
        ours, changed = sk.replace_prefix(tokens, layout, new_prefix, tail="undefined")
    live = int(changed.cu_seqlens[-1])
    assert 0 < live < len(ours) and ours[live:].isnan().all()
    assert not changed.cells[live:].any()
    assert torch.equal(ours[:live], reference(sk.replace_prefix, tokens, layout, new_prefix)[0][:live])


def test_values_move_as_they_are():
    layout = build(AWKWARD["prefix_5"], 3)
    tokens = torch.full((layout.capacity, WIDTH), math.nan)
    tokens[:, 1] = math.inf
    new_prefix = torch.full((2, WIDTH), -math.inf)
    ours, _ = sk.replace_prefix(tokens, layout, new_prefix)
    expected, _ = reference(sk.replace_prefix, tokens, layout, new_prefix)
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("shape", ((0, 5), (3, 0)))
def test_empty_tensors(shape):
    """No rows at all before (images that lost every token), or no columns."""
    capacity, width = shape
    sizes = [0, 0, 0] if capacity == 0 else [0, 1, 3]
    layout = sk.SupertokenLayout(torch.tensor(sizes).int(), torch.zeros(capacity, 4).int(), (2, 2))
    for new in (0, 2):
        arguments = torch.randn(shape), layout, torch.randn(new, width)
        assert_same(sk.replace_prefix(*arguments), reference(sk.replace_prefix, *arguments))


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("new", (0, 1, 6))
@pytest.mark.parametrize("per_image", (False, True))
def test_gradients(name, new, per_image, kernels):
    supervision.shuffle_programs(2)
    layout, tokens = prepared(name, 3)
    tokens.requires_grad_()
    new_prefix = torch.randn((layout.batch_size, new, WIDTH) if per_image else (new, WIDTH), requires_grad=True)
    live = layout.cu_seqlens[-1] + layout.batch_size * (new - layout.num_prefix)
    cotangent = poison(torch.randn(len(tokens) + layout.batch_size * (new - layout.num_prefix), WIDTH), int(live))
    out, _ = sk.replace_prefix(tokens, layout, new_prefix)
    kernels.clear()
    ours = torch.autograd.grad(out, (tokens, new_prefix), cotangent)
    assert kernels == ["swap_prefix_kernel", "sum_prefix_rows_kernel"][: 1 + bool(new_prefix.numel())]
    out, _ = reference(sk.replace_prefix, tokens, layout, new_prefix)
    expected = reference(torch.autograd.grad, out, (tokens, new_prefix), cotangent)
    assert torch.equal(ours[0], expected[0])
    tolerance = 0 if per_image else 1e-6
    torch.testing.assert_close(ours[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_the_sum_over_images_is_as_exact_as_plain_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(prefix, "ELEMENTS", 32)
    layout = sk.SupertokenLayout.uniform(40, (1, 2), num_prefix=1)
    grad = torch.randn(layout.capacity + 40 * 2, WIDTH).to(dtype)
    arguments = layout.cu_seqlens, layout.capacity, 3, 1, False
    backward = torch.ops.step_kernels.replace_prefix_backward
    ours = backward(grad, *arguments)
    plain = reference(backward, grad, *arguments)
    truth = reference(backward, grad.double(), *arguments)
    assert torch.equal(ours[0], plain[0])
    error_rule(ours[1], plain[1], truth[1])


@pytest.mark.parametrize("view", ("expanded", "transposed", "every_other_column"))
def test_gradients_of_any_strides(view):
    layout, tokens = prepared("prefix_5", 3)
    rows = len(tokens) + layout.batch_size * (2 - layout.num_prefix)
    grad = {
        "expanded": torch.randn(1, 1).expand(rows, WIDTH),
        "transposed": torch.randn(WIDTH, rows).T,
        "every_other_column": torch.randn(rows, 2 * WIDTH)[:, ::2],
    }[view]
    backward = torch.ops.step_kernels.replace_prefix_backward
    for per_image in (False, True):
        arguments = layout.cu_seqlens, len(tokens), 2, layout.num_prefix, per_image
        ours, expected = backward(grad, *arguments), reference(backward, grad, *arguments)
        assert torch.equal(ours[0], expected[0])
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_no_images(dtype):
    """Rows of a tail alone: a prefix of no image, or of an image that is not there."""
    layout = sk.SupertokenLayout(torch.zeros(1).int(), torch.zeros(3, 4).int(), (2, 2))
    tokens = torch.full((3, WIDTH), math.nan, dtype=dtype).requires_grad_()
    for shape in ((2, WIDTH), (0, 2, WIDTH)):
        new_prefix = torch.randn(shape, dtype=dtype, requires_grad=True)
        ours, expected = (
            run(tokens, layout, new_prefix) for run in (sk.replace_prefix, partial(reference, sk.replace_prefix))
        )
        assert_same(ours, expected)
        for found in torch.autograd.grad(ours[0], (tokens, new_prefix), torch.full_like(ours[0], math.nan)):
            assert not found.any()


@pytest.mark.parametrize("far", (2**30 + 8, 2**31 + 8))
def test_offsets_past_2_to_the_31(far):
    """A row stride that fits 32 bits with offsets that do not, and one that does not fit, in memory that is reserved but never touched."""
    rows = 4
    tokens = torch.empty((rows - 1) * far + 8, dtype=torch.float16).as_strided((rows, 2), (far, 1))
    tokens.copy_(torch.arange(8).view(4, 2))
    layout = sk.SupertokenLayout.uniform(1, (1, 3), num_prefix=1)
    out, _ = sk.replace_prefix(tokens, layout, torch.full((2, 2), 9.0, dtype=torch.float16))
    assert out.tolist() == [[9, 9], [9, 9], [2, 3], [4, 5], [6, 7]]
