"""upsample_argmax as one kernel: against bilinear interpolation in fp64, and against the reference."""

import math

import brute_force
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cases.upsample import check_labels, exact_scores
from floors import reference
from interpreter import supervision
from tensors import IMAGE_VIEWS, LOW_PRECISION, new_memory_is_nan

import step_kernels as sk
from step_kernels.triton import upsample
from step_kernels.triton.upsample import first_output

# Grid, size of the labels. "quads": the four sources of a tile are scalars; "pixels": each pixel loads its own.
QUADS = {
    "up_16": ((2, 3), (32, 48)),
    "up_odd": ((3, 2), (17, 23)),
    "up_5": ((2, 3), (10, 15)),
    "prime": ((2, 3), (37, 19)),
    "from_one": ((1, 1), (6, 7)),
    "one_row": ((1, 3), (5, 20)),
    "many_tiles": ((1, 1), (70, 40)),
}
PIXELS = {
    "same": ((3, 5), (3, 5)),
    "up_2": ((5, 3), (11, 6)),
    "down": ((12, 9), (5, 4)),
    "down_to_one": ((7, 6), (1, 1)),
    "down_odd": ((21, 15), (7, 5)),
    "up_and_down": ((2, 9), (40, 5)),
    "one_to_one": ((1, 1), (1, 1)),
    "many_tiles": ((20, 3), (18, 34)),
}
SIZES = {f"quads_{name}": size for name, size in QUADS.items()} | {
    f"pixels_{name}": size for name, size in PIXELS.items()
}


@triton.jit
def first_outputs_kernel(out_ptr, sources, outputs, BLOCK: tl.constexpr):
    quad = tl.arange(0, BLOCK).to(tl.int64)
    tl.store(out_ptr + quad, first_output(quad, tl.cast(sources, tl.int64), tl.cast(outputs, tl.int64)))


def check_first_outputs(sources: int, outputs: int) -> None:
    """Quad q owns the outputs from first(q) to first(q + 1): exactly those whose position lies between its two sources."""
    block = triton.next_power_of_2(sources + 2)
    first = torch.empty(block, dtype=torch.int64)
    first_outputs_kernel[(1,)](first, sources, outputs, BLOCK=block)
    output = np.arange(outputs, dtype=np.int64)
    owner = ((2 * output + 1) * sources - outputs) // (2 * outputs) + 1
    expected = np.searchsorted(owner, np.arange(sources + 2), side="left")
    assert np.array_equal(np.minimum(first[: sources + 2].numpy(), outputs), expected), (sources, outputs)
    assert expected[0] == 0 and expected[-1] == outputs
    assert np.diff(expected).max() <= triton.cdiv(outputs, sources), (
        "a quad must fit the tiles that the launcher gives it"
    )


def test_every_output_has_one_quad():
    for sources in range(1, 10):
        for outputs in range(1, 41):
            check_first_outputs(sources, outputs)
    for sources, outputs in ((64, 1024), (33, 513), (37, 601), (1009, 997), (64, 100_003), (2**17 - 1, 2**20 + 7)):
        check_first_outputs(sources, outputs)


@pytest.mark.parametrize("quad_pixels", (1, 10**9))
def test_every_pixel_is_written(quad_pixels, monkeypatch):
    """With one class every label is 0, wherever something was written."""
    monkeypatch.setattr(upsample, "QUAD_PIXELS", quad_pixels)
    monkeypatch.setattr(upsample, "QUAD_BLOCK", (4, 8))
    monkeypatch.setattr(upsample, "TILE", (8, 4))
    sizes = ((2, 3), (13, 19)), ((1, 1), (29, 2)), ((5, 2), (23, 11)), ((7, 3), (13, 17)), ((4, 5), (4, 3))
    with new_memory_is_nan():
        assert torch.zeros(1).new_empty(5, dtype=torch.uint8).eq(255).all()
        for grid, size in sizes:
            assert not sk.upsample_argmax(torch.randn(1, 1, *grid), size).any(), (grid, size)


@pytest.mark.parametrize("name", SIZES)
def test_labels_are_those_of_interpolation(name, kernels):
    supervision.shuffle_programs(3)
    grid, size = SIZES[name]
    canvas = torch.randn(2, 5, *grid)
    labels = sk.upsample_argmax(canvas, size)
    assert kernels == ["label_kernel"]
    check_labels(labels, brute_force.upsample(canvas, size))
    assert torch.equal(labels, reference(sk.upsample_argmax, canvas, size))


@pytest.mark.parametrize("name", SIZES)
def test_the_exact_scores_are_those_of_interpolation(name, kernels):
    grid, size = SIZES[name]
    canvas = torch.randn(2, 4, *grid, dtype=torch.float64)
    expected = F.interpolate(canvas, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(exact_scores(canvas, size), expected, rtol=1e-12, atol=1e-12)
    kernels.append("of the tests themselves")


@pytest.mark.parametrize("block", ((1, 2), (4, 2), (2, 16)))
def test_tiles_of_any_size(block, monkeypatch):
    monkeypatch.setattr(upsample, "QUAD_BLOCK", block)
    monkeypatch.setattr(upsample, "TILE", (4 * block[0], block[1]))
    for grid, size in (((1, 1), (7, 9)), ((5, 7), (7, 3))):
        canvas = torch.randn(1, 3, *grid)
        check_labels(sk.upsample_argmax(canvas, size), brute_force.upsample(canvas, size))


@pytest.mark.parametrize("classes", (1, 2, 3, 5, 150, 256, 257))
def test_any_number_of_classes(classes, monkeypatch):
    monkeypatch.setattr(upsample, "CLASSES_AT_A_TIME", 64)
    for grid, size in (((1, 2), (4, 8)), ((3, 3), (2, 2))):
        canvas = torch.randn(1, classes, *grid)
        canvas[:, -1, 0, 0] = 9.0
        labels = sk.upsample_argmax(canvas, size)
        check_labels(labels, brute_force.upsample(canvas, size))
        assert labels[0, 0, 0] == classes - 1


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("view", IMAGE_VIEWS)
def test_canvas_of_any_strides_and_dtype(view, dtype):
    canvas = torch.randn(2, 4, 2, 2).to(dtype)
    for size in ((9, 8), (3, 4)):
        check_labels(sk.upsample_argmax(IMAGE_VIEWS[view](canvas), size), brute_force.upsample(canvas, size))


def test_an_expanded_canvas():
    canvas = torch.randn(1, 4, 1, 3)
    for size in ((12, 15), (2, 2)):
        labels = sk.upsample_argmax(canvas.expand(2, 4, 3, 3), size)
        assert torch.equal(labels, sk.upsample_argmax(canvas, (1, size[1])).expand(2, *size))


@pytest.mark.parametrize("spread", (100.0, 1.0, 0.01))
def test_leaving_out_classes_that_cannot_win_changes_nothing(spread):
    """Scores with one clear winner, with many rivals, and with nearly equal ones."""
    canvas = 0.1 * torch.randn(1, 12, 3, 3)
    canvas += spread * F.one_hot(torch.randint(12, (1, 3, 3)), 12).movedim(-1, 1)
    check_labels(sk.upsample_argmax(canvas, (14, 15)), exact_scores(canvas, (14, 15)))


# Quads (even and odd ratio) and per-pixel sources (odd ratio and any ratio).
RATIOS = ((12, 16), (10, 20), (4, 8), (2, 4), (3, 5))


@pytest.mark.parametrize("size", RATIOS)
def test_ties_go_to_the_lowest_class(size):
    canvas = torch.zeros(1, 7, 2, 4)
    assert not sk.upsample_argmax(canvas, size).any()
    canvas[:, [3, 5]] = 1
    assert (sk.upsample_argmax(canvas, size) == 3).all()
    canvas = torch.full((1, 4, 2, 4), -3e38)
    canvas[:, 3] = -2e38
    assert (sk.upsample_argmax(canvas, size) == 3).all()


@pytest.mark.parametrize("size", RATIOS)
def test_nan_beats_everything(size):
    """As torch.argmax has it: the first NaN wins, wherever it reaches; a class with a NaN is never left out."""
    canvas = torch.randn(1, 6, 2, 4) - 50
    canvas[:, 1] += 100  # far above the rest: the others could be left out
    canvas[0, 4, 0, 0] = canvas[0, 2, 0, 1] = canvas[0, 5, 1, 3] = math.nan
    canvas[0, 3, 1, 3] = math.inf
    expected = exact_scores(canvas, size).argmax(1)
    assert {1, 2, 4, 5} <= set(expected.unique().tolist())
    assert torch.equal(sk.upsample_argmax(canvas, size).long(), expected)
    assert not sk.upsample_argmax(torch.full_like(canvas, math.nan), size).any()


@pytest.mark.parametrize("size", RATIOS)
def test_infinite_scores(size):
    canvas = torch.randn(1, 5, 2, 4)
    canvas[:, 0] = -math.inf  # an impossible class wins nowhere, also on the borders
    canvas[:, 1, 0] = -math.inf
    canvas[:, 2, 1, 2:] = math.inf
    canvas[:, 4, 1, 3] = math.inf
    canvas[:, 3, 1, 0] = -math.inf
    labels = sk.upsample_argmax(canvas, size)
    check_labels(labels, exact_scores(canvas, size), decided=0.0)
    assert (labels != 0).all() and (labels == 2).any()
    assert not sk.upsample_argmax(torch.full_like(canvas, -math.inf), size).any()
    opposed = canvas.clone()
    opposed[:, 2, 0, 2] = -math.inf  # between -inf and inf lies NaN
    assert torch.equal(sk.upsample_argmax(opposed, size).long(), exact_scores(opposed, size).argmax(1))


def test_half_precision_near_the_limit():
    canvas = torch.full((1, 3, 2, 2), 6e4, dtype=torch.float16)
    canvas[:, 1] = 6.5e4
    for size in ((9, 9), (3, 3)):
        assert (sk.upsample_argmax(canvas, size) == 1).all()


def test_batch_mates_do_not_matter():
    canvas = torch.randn(3, 4, 1, 2)
    canvas[1] = math.nan
    for size in ((5, 10), (3, 4)):
        together = sk.upsample_argmax(canvas, size)
        for index in range(3):
            assert torch.equal(sk.upsample_argmax(canvas[index : index + 1], size)[0], together[index])


def test_an_empty_batch_launches_nothing(kernels):
    labels = sk.upsample_argmax(torch.zeros(0, 300, 3, 4), (9, 9))
    assert labels.shape == (0, 9, 9) and labels.dtype == torch.int32 and not kernels
    kernels.append("an empty batch needs no kernel")


@pytest.mark.parametrize("far", (2**30 + 8, 2**31 + 8))
def test_offsets_past_2_to_the_31(far):
    """A stride that fits 32 bits with offsets that do not, and one that does not fit, in memory that is reserved but never touched."""
    last = 2**31 // far + 1
    storage = torch.empty(last * far + 64, dtype=torch.float16)
    for dim in range(4):
        shape, strides = [1, 2, 1, 1], [16, 8, 4, 2]
        shape[dim], strides[dim] = last + 1, far
        canvas = storage.as_strided(shape, strides)
        canvas.zero_()
        index = [0, 1, 0, 0]
        index[dim] = last
        canvas[tuple(index)] = 1.0
        for size in ((4 * shape[2], 4 * shape[3]), (shape[2], shape[3])):
            labels = sk.upsample_argmax(canvas, size)
            assert labels.flatten()[-1] == index[1]
            assert torch.equal(labels.long(), exact_scores(canvas, size).argmax(1))
