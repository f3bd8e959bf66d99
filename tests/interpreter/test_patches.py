"""merge_patches and its gradient as kernels, against the reference."""

import pytest
import torch
from cases.merge import EVERY_SIDE, MEAN, NAMES, RESAMPLES, STD, TINY, images_for, merged
from floors import hold, reference
from interpreter import supervision
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build
from tensors import IMAGE_VIEWS, LOW_PRECISION, new_memory_is_nan, poison, wide_rows
from torch import Tensor

import step_kernels as sk
from step_kernels.triton.merge import backward as patches_backward
from step_kernels.triton.merge import patches


def check_merge(plain: PlainLayout, spare: int | None, images: Tensor, patch_size: int, **options) -> None:
    """Values, tail and gradient, although the cotangent's tail is NaN."""
    layout, live = build(plain, spare), len(plain.tokens())
    cotangent = exact = None
    if images.is_floating_point():
        cotangent = poison(torch.randn(layout.capacity, images.shape[1] * patch_size**2).to(images.dtype), live)
    else:
        exact = images.double() / 255, layout, patch_size, None, options
    out, *_ = hold(merged, images, layout, patch_size, cotangent, options, exact=exact)
    assert not out[live:].any()


@pytest.mark.parametrize("name", NAMES)
def test_awkward_layouts(name, kernels, monkeypatch):
    monkeypatch.setattr(patches_backward, "BACKWARD_CELLS", 32)
    plain = AWKWARD[name]
    supervision.shuffle_programs(1)
    check_merge(plain, 3, images_for(plain), 2)
    assert kernels == ["merge_patches_kernel", "merge_patches_backward_kernel"]


@pytest.mark.parametrize("name", ["ragged_3x5", "holes", "image_emptied"])
def test_awkward_layouts_bilinear(name):
    plain = AWKWARD[name]
    check_merge(plain, 3, images_for(plain), 2, resample="bilinear")


@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", ["holes", "first_and_last_emptied", "all_halted", "all_halted_prefix"])
def test_spare_rows(name, spare, kernels):
    plain = AWKWARD[name]
    check_merge(plain, spare, images_for(plain, 1), 1, mean=MEAN[:3], std=STD[:3])
    empty = name == "all_halted" and spare == 0
    assert kernels == ["merge_patches_kernel"] * (not empty) + ["merge_patches_backward_kernel"]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("resample", RESAMPLES)
def test_dtypes(dtype, resample):
    plain = AWKWARD["ragged_3x5"]
    check_merge(plain, 3, images_for(plain, dtype=dtype), 2, resample=resample)


@pytest.mark.parametrize("dtype", [torch.uint8, *LOW_PRECISION])
@pytest.mark.parametrize("given", ["", "mean", "std", "mean std"])
def test_statistics(given, dtype):
    statistics = {"mean": MEAN[:3].double(), "std": torch.stack([STD, STD], 1).flatten()[:6:2]}  # stride 2
    options = {name: statistics[name] for name in given.split()}
    resample = RESAMPLES[given == "mean"]
    check_merge(TINY, 3, images_for(TINY, dtype=dtype), 2, resample=resample, **options)


PATCHES = [(1, 1, 16), (1, 4, 4096), (3, 3, 16), (3, 4, 4096), (14, 1, 32), (14, 3, 4096), (16, 1, 128), (16, 4, 4096)]


@pytest.mark.parametrize(("patch_size", "channels", "tile"), PATCHES)
def test_patch_sizes_and_channels(patch_size, channels, tile, monkeypatch):
    """A small tile splits a row of a patch, and makes large tokens of those of side 2."""
    monkeypatch.setattr(patches, "MERGE_ROWS", ((tile, 6, 8192, 4),))
    monkeypatch.setattr(patches_backward, "BACKWARD_TILE", 16 * tile)
    images = images_for(TINY, patch_size, channels)
    check_merge(TINY, 1, images, patch_size, mean=MEAN[:channels], std=STD[:channels])


@pytest.mark.parametrize(("patch_size", "tile"), [(3, 16), (14, 64)])
def test_patch_sizes_bilinear(patch_size, tile, monkeypatch):
    monkeypatch.setattr(patches, "SCATTERED_TILE", tile)
    check_merge(TINY, 1, images_for(TINY, patch_size), patch_size, resample="bilinear")


@pytest.mark.parametrize(("tile", "tiles"), [(4096, 4), (4096, 1), (1024, 2)])
def test_every_side(tile, tiles, monkeypatch, kernels):
    """Sides from 64, 32 and 16 on are large."""
    monkeypatch.setattr(patches, "MERGE_ROWS", ((tile, tiles, 8192, 4),))
    supervision.shuffle_programs(2)
    layout, images = build(EVERY_SIDE, 3), images_for(EVERY_SIDE, 2)
    for resample in RESAMPLES if tile == 1024 else ["area"]:
        hold(merged, images, layout, 2, None, {"resample": resample})
    assert set(kernels) == {"merge_patches_kernel"}


@pytest.mark.parametrize("resample", RESAMPLES)
def test_gradient_of_every_side(resample, monkeypatch):
    monkeypatch.setattr(patches_backward, "BACKWARD_CELLS", 128)
    layout, grad = build(EVERY_SIDE, 3), torch.randn(11, 3)
    arguments = layout.cu_seqlens, layout.cells, [1, 3, 64, 128], 1, resample == "bilinear", STD[:3]
    hold(lambda *given: [torch.ops.step_kernels.merge_patches_backward(*given)], grad, *arguments)


def test_large_tokens_in_many_shares(monkeypatch):
    """Every token of side 2 and up is shared out, one tile a program."""
    monkeypatch.setattr(patches, "MERGE_ROWS", ((16, 1, 8192, 4),))
    plain = PlainLayout((((0, 0, 4), (0, 4, 2), (1, 6, 1), (2, 4, 2)), (), ((0, 4, 4), (2, 0, 2))), (5, 9), 2)
    check_merge(plain, 3, images_for(plain, 3, 1), 3)


@pytest.mark.parametrize("resample", RESAMPLES)
def test_few_programs_walk_many_rows(resample, monkeypatch):
    monkeypatch.setattr(patches, "MERGE_ROWS", ((2048, 6, 3, 4),))
    monkeypatch.setattr(patches, "ZERO_BLOCK", 4)
    check_merge(TINY, None, images_for(TINY), 2, resample=resample)


@pytest.mark.parametrize("view", [*IMAGE_VIEWS, "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_image_strides(view, dtype):
    layout, images = build(TINY, 3), images_for(TINY, dtype=dtype)
    strided = images[:1].expand(2, -1, -1, -1) if view == "expanded" else IMAGE_VIEWS[view](images)
    assert strided.stride() != images.stride()
    for resample in RESAMPLES:
        ours = sk.merge_patches(strided, layout, 2, resample=resample)
        assert torch.equal(ours, sk.merge_patches(strided.contiguous(), layout, 2, resample=resample))
    check_merge(TINY, 3, strided, 2)


@pytest.mark.parametrize("view", ["expanded", "wide_rows", "transposed"])
def test_strides_of_a_gradient(view):
    plain = AWKWARD["holes"]
    layout = build(plain, 3)
    grad = torch.randn(layout.capacity, 12)
    change = {
        "expanded": lambda grad: grad[:1, :1].expand(layout.capacity, 12),
        "wide_rows": wide_rows,
        "transposed": lambda grad: grad.T.contiguous().T,
    }
    grad = change[view](grad)
    op = torch.ops.step_kernels.merge_patches_backward
    arguments = layout.cu_seqlens, layout.cells, list(images_for(plain).shape), 2, False, STD[:3]
    torch.testing.assert_close(op(grad, *arguments), reference(op, grad, *arguments))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_side_1_is_copied_bit_by_bit(dtype):
    layout = sk.SupertokenLayout.uniform(2, (2, 3))
    bits = torch.randint(-(2**15), 2**15, (2, 3, 4, 3 * dtype.itemsize), dtype=torch.int16)
    bits[0, 0, 0, :6] = torch.tensor([0x7FA1, -0x5F, 0x7FC3, -0x8000, 1, 0x7F80])
    images = bits.view(dtype)
    assert images.isnan().any()
    expected = reference(sk.merge_patches, images, layout, 2)
    for resample in RESAMPLES:
        ours = sk.merge_patches(images, layout, 2, resample=resample)
        assert torch.equal(ours.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_mean_of_large_values_in_fp16(resample):
    """The sum overflows fp16, the mean does not."""
    layout = sk.SupertokenLayout.uniform(1, (8, 8), side=8)
    images = torch.full((1, 3, 8, 8), 6e4, dtype=torch.float16)
    assert torch.equal(sk.merge_patches(images, layout, 1, resample=resample), images[:, :, 0, 0])


def test_nan_and_infinity_stay_in_their_blocks():
    plain = AWKWARD["ragged_3x5"]
    layout, images = build(plain, 3), images_for(plain)
    images[0, 1, 0, 0], images[2, 0, 3, 3] = float("nan"), float("inf")
    ours, expected = sk.merge_patches(images, layout, 2), reference(sk.merge_patches, images, layout, 2)
    torch.testing.assert_close(ours, expected, equal_nan=True)
    assert ours.isnan().sum() == 1 and ours.isinf().sum() == 1


def test_an_undefined_tail_is_not_written():
    layout, live = build(TINY, 3), len(TINY.tokens())
    images, weight, pos_embed = images_for(TINY), torch.randn(5, 3, 2, 2), torch.randn(10, 5)
    for op, arguments in ((sk.merge_patches, (2,)), (sk.embed_patches, (weight,))):
        options = {"pos_embed": pos_embed} if op is sk.embed_patches else {}
        with new_memory_is_nan():
            filled, ours = (op(images, layout, *arguments, tail=tail, **options) for tail in ("zero", "undefined"))
        assert torch.equal(ours[:live], filled[:live])
        assert ours[live:].isnan().all() and not filled[live:].any()


def test_batch_mates_do_not_matter():
    plain = AWKWARD["ragged_3x5"]
    images, starts = images_for(plain), plain.cu_seqlens()
    together = sk.merge_patches(images, build(plain), 2)
    for index, blocks in enumerate(plain.images):
        alone = build(PlainLayout((blocks,), plain.grid))
        ours = sk.merge_patches(images[index : index + 1], alone, 2)
        assert torch.equal(ours, together[starts[index] : starts[index + 1]])


@pytest.mark.parametrize("dimension", range(4))
def test_image_offsets_past_2_to_the_31(dimension):
    """Memory that is reserved, and touched at its two ends only."""
    strides = [8, 4, 2, 1]
    strides[dimension] = 2**31 + 8
    images = torch.empty(2**31 + 64, dtype=torch.uint8).as_strided((2, 2, 2, 2), strides)
    images.copy_(torch.arange(16).view(2, 2, 2, 2))
    for side in (1, 2):
        layout = sk.SupertokenLayout.uniform(2, (2, 2), side=side)
        for resample in RESAMPLES:
            ours = sk.merge_patches(images, layout, 1, resample=resample)
            assert torch.equal(ours, sk.merge_patches(images.contiguous(), layout, 1, resample=resample))


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (1, 2**31 + 8)])
def test_gradient_offsets_past_2_to_the_31(strides):
    layout = sk.SupertokenLayout.uniform(2, (2, 2), side=2)
    grad = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 2), strides)
    grad.copy_(torch.arange(4).view(2, 2))
    backward = torch.ops.step_kernels.merge_patches_backward
    ours = backward(grad, layout.cu_seqlens, layout.cells, [2, 2, 2, 2], 1, False, None)
    assert torch.equal(ours, (torch.arange(4) / 4).half().view(2, 2, 1, 1).expand(2, 2, 2, 2))


def test_no_channels(kernels):
    merged = sk.merge_patches(torch.zeros(2, 0, 8, 8), build(AWKWARD["all_halted"], 3), 2)
    assert merged.shape == (3, 0)
    kernels.append("there is nothing to merge")
