"""merge_tokens, scatter_back, scatter_into, their gradients and layout.sides() as kernels, against the reference."""

import pytest
import torch
from cases.merge import pooled
from floors import hold, reference
from interpreter import supervision
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build, tile
from tensors import LOW_PRECISION, new_memory_is_nan, offset, poison, wide_rows

import step_kernels as sk
from step_kernels.reference import cells as oracle
from step_kernels.triton.common import cells as blocks

SMALL = {name: layout for name, layout in AWKWARD.items() if name not in ("empty_batch", "odd_17x33")}
WIDTH = 5


@pytest.fixture
def shuffled(kernels):
    supervision.shuffle_programs(1)


def prepared(
    name: str, spare: int | None, dtype: torch.dtype, width: int = WIDTH
) -> tuple[sk.SupertokenLayout, int, torch.Tensor]:
    """A layout, its live rows, and values [capacity, width] with NaN past them."""
    layout = build(SMALL[name], spare)
    live = len(SMALL[name].tokens())
    return layout, live, poison(torch.randn(layout.capacity, width).to(dtype), live)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_scatter_is_exact(name, spare, shuffled, kernels):
    width = WIDTH if spare is None else WIDTH + 1  # the even one in pairs
    layout, _, values = prepared(name, spare, torch.float32, width)
    where = torch.rand(layout.capacity) < 0.6
    for chosen in (None, where):
        kernels.clear()
        ours = sk.scatter_back(values, layout, where=chosen)
        assert kernels == ["expand_blocks_kernel"]
        assert torch.equal(ours, reference(sk.scatter_back, values, layout, where=chosen))
        canvas = torch.randn(layout.batch_size, width, *layout.grid)
        expected = reference(sk.scatter_into, canvas.clone(), values, layout, where=chosen)
        assert torch.equal(sk.scatter_into(canvas, values, layout, where=chosen), expected)


@pytest.mark.parametrize("name", SMALL)
def test_sides(name, shuffled, kernels):
    layout = build(SMALL[name], 3)
    kernels.clear()
    assert torch.equal(layout.sides(), reference(layout.sides))
    assert kernels == ["expand_blocks_kernel"]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "window"])
def test_scatter_into_a_canvas_of_any_strides(dtype, memory):
    layout, _, values = prepared("holes", 3, torch.float32)
    canvas = torch.randn(layout.batch_size, WIDTH, *layout.grid).to(dtype)
    if memory == "channels_last":
        canvas = canvas.contiguous(memory_format=torch.channels_last)
    elif memory == "window":
        canvas = torch.randn(layout.batch_size, WIDTH + 2, 9, 12).to(dtype)[:, 1:-1, 1:7, 2:9]
    expected = reference(sk.scatter_into, canvas.clone(), offset(wide_rows(values)), layout)
    assert torch.equal(sk.scatter_into(canvas, wide_rows(values), layout), expected)


@pytest.mark.parametrize("name", SMALL)
def test_gradients(name, shuffled, kernels):
    layout, live, values = prepared(name, 3, torch.float32)
    where = torch.rand(layout.capacity) < 0.6
    values.requires_grad_()
    cotangent = torch.randn(layout.batch_size, WIDTH, *layout.grid)
    for chosen in (None, where):
        kernels.clear()
        (ours,) = torch.autograd.grad(sk.scatter_back(values, layout, where=chosen), values, cotangent)
        assert kernels == ["expand_blocks_kernel", "reduce_blocks_kernel"]
        (expected,) = reference(
            lambda chosen: torch.autograd.grad(sk.scatter_back(values, layout, where=chosen), values, cotangent), chosen
        )
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)
        assert not ours[live:].any()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_merge_tokens(name, dtype, kernels):
    plain = SMALL[name]
    layout = build(plain, 3)
    tokens = torch.randn(layout.batch_size, layout.grid[0] * layout.grid[1], WIDTH).to(dtype)
    prefix = torch.randn(plain.num_prefix, WIDTH).to(dtype)
    cotangent = poison(torch.randn(layout.capacity, WIDTH).to(dtype), len(plain.tokens()))
    for given in (None, prefix):
        kernels.clear()
        hold(pooled, tokens, given, layout, cotangent)
        sums = given is not None and plain.num_prefix > 0
        assert kernels == ["reduce_blocks_kernel", "expand_blocks_kernel"] + ["sum_prefix_rows_kernel"] * sums


def test_many_images_some_empty():
    plain = PlainLayout(tuple(((0, 0, 2),) if image % 3 else () for image in range(256)), (2, 2), 1)
    layout = build(plain, 5)
    values = torch.randn(layout.capacity, 2)
    assert torch.equal(sk.scatter_back(values, layout), reference(sk.scatter_back, values, layout))
    tokens = torch.randn(256, 4, 2)
    torch.testing.assert_close(sk.merge_tokens(tokens, layout), reference(sk.merge_tokens, tokens, layout))


def test_a_grid_of_a_million_cells(monkeypatch):
    monkeypatch.setattr(blocks, "EXPAND_ROWS", ((2**17, 4),))
    layout = sk.SupertokenLayout.uniform(1, (1024, 1024), side=64)
    values = torch.randn(layout.capacity, 1)
    assert torch.equal(sk.scatter_back(values, layout), reference(sk.scatter_back, values, layout))


def test_a_selection_of_any_stride():
    layout, _, values = prepared("holes", 3, torch.float32)
    where = (torch.rand(layout.capacity, 2) < 0.6)[:, 1]
    assert torch.equal(
        sk.scatter_back(values, layout, where=where), reference(sk.scatter_back, values, layout, where=where)
    )
    grad = torch.randn(layout.batch_size, *layout.grid, WIDTH)
    metadata = layout.cu_seqlens, layout.cells
    ours = blocks.reduce_blocks(grad, *metadata, mean=False, where=where)
    torch.testing.assert_close(ours, oracle.reduce_blocks(grad, *metadata, mean=False, where=where))


@pytest.mark.parametrize("view", ["transposed", "expanded"])
def test_a_prefix_of_any_strides(view):
    layout = build(SMALL["prefix_5"], 3)
    prefix = torch.randn(WIDTH, 5).T if view == "transposed" else torch.randn(5, 1).expand(-1, WIDTH)
    tokens = torch.randn(layout.batch_size, 24, WIDTH)
    ours = sk.merge_tokens(tokens, layout, prefix=prefix)
    torch.testing.assert_close(ours, reference(sk.merge_tokens, tokens, layout, prefix=prefix))
    images, weight = torch.randn(layout.batch_size, 1, 4, 6), torch.randn(WIDTH, 1, 1, 1)
    ours = sk.embed_patches(images, layout, weight, prefix=prefix)
    torch.testing.assert_close(ours, reference(sk.embed_patches, images, layout, weight, prefix=prefix))


def test_the_gradient_of_a_plain_sum():
    """It is expanded: strides of zero."""
    layout = build(SMALL["prefix_5"], 3)
    tokens = torch.randn(layout.batch_size, 24, WIDTH, requires_grad=True)
    prefix = torch.randn(5, WIDTH, requires_grad=True)
    values = torch.randn(layout.capacity, WIDTH, requires_grad=True)
    grads = lambda: torch.autograd.grad(  # noqa: E731
        sk.merge_tokens(tokens, layout, prefix=prefix).sum() + sk.scatter_back(values, layout).sum(),
        (tokens, prefix, values),
    )
    for ours, expected in zip(grads(), reference(grads), strict=True):
        torch.testing.assert_close(ours, expected)


def test_large_sides_and_many_channel_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "REDUCE_ROWS", ((4, 4, 4),))
    monkeypatch.setattr(blocks, "EXPAND_CHANNELS", 4)
    monkeypatch.setattr(blocks, "EXPAND_ROWS", ((512, 4),))
    grid = (64, 66)
    plain = PlainLayout(
        (tile(grid, lambda row, column, side: side == 64), tile(grid, lambda *_: True, 32)[3:]), grid, 1
    )
    layout = build(plain, 2)
    values = torch.randn(layout.capacity, 6)
    assert torch.equal(sk.scatter_back(values, layout), reference(sk.scatter_back, values, layout))
    tokens = torch.randn(2, 64 * 66, 6)
    torch.testing.assert_close(sk.merge_tokens(tokens, layout), reference(sk.merge_tokens, tokens, layout))


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("name", ["all_sides_16", "prefix_5", "image_emptied"])
def test_positions_on_top_of_an_addend(name, bilinear):
    """What embed_patches asks for: positions shared by the images, pooled, added to the rows of blocks; and its gradient."""
    plain = SMALL[name]
    layout = build(plain, 3)
    metadata = layout.cu_seqlens, layout.cells
    positions = torch.randn(1, *layout.grid, WIDTH).expand(layout.batch_size, -1, -1, -1)
    addend = poison(torch.randn(layout.capacity, WIDTH), len(plain.tokens()))
    is_block = layout.cells[:, 3:] > 0
    prefix = torch.randn(plain.num_prefix, WIDTH)
    for features in (positions, None):
        ours = blocks.reduce_blocks(
            features, *metadata, mean=True, bilinear=bilinear, prefix=prefix, addend=wide_rows(addend)
        )
        expected = torch.where(is_block, addend, 0)
        if features is not None:
            expected = expected + oracle.reduce_blocks(features, *metadata, mean=True, bilinear=bilinear)
        if plain.num_prefix:
            expected[oracle.prefix_rows(layout.cu_seqlens, plain.num_prefix)] = prefix
        torch.testing.assert_close(ours, expected)
    values = poison(torch.randn(layout.capacity, WIDTH), len(plain.tokens()))
    ours = torch.full((layout.batch_size, *layout.grid, WIDTH), 7.0)
    blocks.expand_blocks_(ours, values, *metadata, mean=True, bilinear=bilinear, fill_zero=True)
    expected = oracle.expand_blocks_(torch.zeros_like(ours), values, *metadata, mean=True, bilinear=bilinear)
    torch.testing.assert_close(ours, expected)


def test_an_undefined_tail_is_not_written():
    plain = SMALL["prefix_5"]
    layout, live = build(plain, 3), len(plain.tokens())
    tokens = torch.randn(layout.batch_size, 24, WIDTH)
    with new_memory_is_nan():
        filled, ours = (sk.merge_tokens(tokens, layout, tail=tail) for tail in ("zero", "undefined"))
    assert torch.equal(ours[:live], filled[:live])
    assert ours[live:].isnan().all() and not filled[live:].any()


def test_the_mean_of_large_values_in_fp16():
    """The sum overflows fp16, the mean does not."""
    layout = sk.SupertokenLayout.uniform(1, (8, 8), side=8)
    tokens = torch.full((1, 64, WIDTH), 6e4, dtype=torch.float16)
    assert torch.equal(sk.merge_tokens(tokens, layout), tokens[:, 0])


def test_addresses_that_need_64_bits():
    """A canvas whose strides reach past 2^31 elements, of which only the first cells exist in memory."""
    layout = sk.SupertokenLayout.uniform(1, (1, 2))
    storage = torch.zeros(8)
    canvas = storage.as_strided((1, 2, 1, 2), (2**33, 1, 2**33, 2))
    sk.scatter_into(canvas, torch.ones(2, 2), layout)
    assert storage.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    values = torch.arange(8.0).as_strided((1, 2), (2**33, 1))
    assert (
        sk.scatter_back(values, sk.SupertokenLayout.uniform(1, (2, 2), side=2)).flatten(2)[0, 1].tolist() == [1.0] * 4
    )
    features = torch.arange(8.0).as_strided((1, 1, 2, 2), (2**33, 2**33, 2, 1))
    sums = blocks.reduce_blocks(features, layout.cu_seqlens, layout.cells, mean=False)
    assert sums.tolist() == [[0, 1], [2, 3]]


def test_offsets_past_2_to_the_31():
    """The last cell of a canvas of more than 2^31 elements, in memory that is reserved but never touched elsewhere."""
    rows, cols = 1, 2
    layout = sk.SupertokenLayout.uniform(1, (rows, cols))
    canvas = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((1, 1, rows, cols), (1, 1, 1, 2**31 + 8))
    sk.scatter_into(canvas, torch.tensor([[1.0], [2.0]], dtype=torch.float16), layout)
    assert canvas.flatten().tolist() == [1.0, 2.0]
    back = blocks.reduce_blocks(canvas.permute(0, 2, 3, 1), layout.cu_seqlens, layout.cells, mean=True)
    assert back.flatten().tolist() == [1.0, 2.0]
