"""merge_patches, embed_patches and their gradients on a GPU against the CPU reference."""

import dataclasses

import pytest
import torch
from cases.merge import MEAN, RESAMPLES, STD, embedded, embedding, images_for, merged
from floors import changed, hold, reference
from gpu.syncs import capture, needs_memory, same_where_not_current, ten_runs_are_identical
from layouts import mixed
from tensors import IMAGE_VIEWS, LOW_PRECISION, identical, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu

GRIDS = [(1, (1, 1)), (4, (64, 64)), (3, (17, 33)), (64, (8, 8)), (1, (64, 128))]


def a_layout(batch: int, grid: tuple[int, int]) -> sk.SupertokenLayout:
    return mixed(batch, grid, threshold=0.9, sides=(2, 4, 8, 16, 32, 64))


def check_merge(layout, images, patch_size, **options):
    cotangent = exact = None
    if images.is_floating_point():
        cotangent = poison(torch.randn(layout.capacity, 3 * patch_size**2).to(images.dtype), layout.num_tokens)
    else:
        exact = images.double() / 255, layout, patch_size, None, options
    hold(merged, images, layout, patch_size, cotangent, options, exact=exact, device="cuda")


@pytest.mark.parametrize(("batch", "grid"), GRIDS)
@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("dtype", [torch.uint8, *LOW_PRECISION])
def test_merge_patches(batch, grid, resample, dtype):
    layout = a_layout(batch, grid)
    check_merge(layout, images_for(layout, 16, dtype=dtype), 16, resample=resample, mean=MEAN[:3], std=STD[:3])


@pytest.mark.parametrize("patch_size", [1, 3, 8, 14, 32])
def test_patch_sizes(patch_size):
    layout = a_layout(3, (33, 17))
    for resample in RESAMPLES:
        check_merge(layout, images_for(layout, patch_size), patch_size, resample=resample)


@pytest.mark.parametrize("view", IMAGE_VIEWS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_image_strides(view, dtype):
    layout = a_layout(2, (32, 32)).to("cuda")
    images = images_for(layout, 16, dtype=dtype).cuda()
    strided = IMAGE_VIEWS[view](images)
    assert strided.stride() != images.stride()
    for resample in RESAMPLES:
        ours, plain = (sk.merge_patches(x, layout, 16, resample=resample).float() for x in (strided, images))
        torch.testing.assert_close(ours, plain, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_side_1_is_copied_bit_by_bit(dtype):
    layout = sk.SupertokenLayout.uniform(2, (8, 8), device="cuda")
    bits = torch.randint(-(2**15), 2**15, (2, 3, 128, 64 * dtype.itemsize), dtype=torch.int16, device="cuda")
    ours = sk.merge_patches(bits.view(dtype), layout, 16)
    expected = reference(sk.merge_patches, bits.view(dtype), layout, 16)
    assert torch.equal(ours.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("pixels", ["bytes", "floats"])
@pytest.mark.parametrize("mode", ["exact", "static", "expected"])
def test_embed_patches(resample, dtype, pixels, mode):
    """Plain PyTorch on the GPU as well, as its matmul takes part in both."""
    layout = a_layout(2, (32, 48))
    if mode == "exact":
        layout = layout.trim()
    if mode == "expected":
        layout = dataclasses.replace(layout, expected_tokens=600)
    parameters = {name: x / len(x) ** 0.5 if len(x) else x for name, x in embedding(layout, dtype, 16, 192).items()}
    tensors = {"images": images_for(layout, 16, dtype=torch.uint8 if pixels == "bytes" else dtype), **parameters}
    cotangent = poison(torch.randn(layout.capacity, 192).to(dtype), layout.num_tokens)
    arguments = tensors, layout, cotangent, {"resample": resample}
    out, *_ = hold(embedded, *arguments, device="cuda", plain_device="cuda")
    assert not out[layout.num_tokens :].any()


def test_runs_repeat():
    layout = a_layout(4, (64, 64)).to("cuda")
    images = images_for(layout, 16, dtype=torch.bfloat16).cuda()
    cotangent = torch.randn(layout.capacity, 768, device="cuda").bfloat16()
    ten_runs_are_identical(lambda: merged(images, layout, 16, cotangent, {}))


def test_batch_mates_do_not_matter():
    layout = a_layout(4, (64, 64))
    images = images_for(layout, 16).cuda()
    merged = sk.merge_patches(images, layout.to("cuda"), 16)
    alone = reference(lambda: sk.SupertokenLayout.from_sides(layout.sides()[2:3], num_prefix=1))
    start, stop = layout.cu_seqlens[2:4].tolist()
    ours = sk.merge_patches(images[2:3], alone.to("cuda"), 16)
    assert torch.equal(ours[: stop - start], merged[start:stop])


def test_a_captured_embedding_replays_on_other_images_and_layouts():
    first, second = (a_layout(4, (32, 32)).to("cuda") for _ in range(2))
    layout = sk.SupertokenLayout(first.cu_seqlens.clone(), first.cells.clone(), (32, 32), 1)
    images = images_for(layout, 16, dtype=torch.bfloat16).cuda()
    parameters = changed(embedding(layout, torch.bfloat16, 16, 192), lambda x: x.cuda())
    run = lambda layout: [sk.embed_patches(images, layout, **parameters)]  # noqa: E731
    replay = capture(lambda: run(layout))
    layout.cu_seqlens.copy_(second.cu_seqlens)
    layout.cells.copy_(second.cells)
    images.normal_()
    identical(replay(), run(second))


def test_more_than_2_to_the_31_elements():
    """Images of 2.4e9 bytes, patches of as many floats, and a gradient of as many pixels in fp16."""
    batch, grid, patch_size = 3, (1024, 1024), 16
    needs_memory(16)
    images = torch.zeros(batch, 3, grid[0] * patch_size, grid[1] * patch_size, device="cuda", dtype=torch.uint8)
    images[2] = 51
    images[2, 2, -16:, -16:] = 255
    coarse = sk.SupertokenLayout.uniform(batch, grid, side=64, device="cuda")
    merged = sk.merge_patches(images, coarse, patch_size)
    assert torch.equal(merged[-2], torch.full_like(merged[-2], 0.2)) and not merged[: 2 * 256].any()
    expected = torch.full((16, 16), 0.2, device="cuda")
    expected[-1, -1] = (51 * (4096 - 256) + 255 * 256) / 4096 / 255
    torch.testing.assert_close(merged[-1].view(3, 16, 16)[2], expected)
    numbers = torch.arange(1.0, 3 * 256 + 1, device="cuda").half()
    grad = numbers[:, None].expand(-1, 3 * patch_size**2)
    backward = torch.ops.step_kernels.merge_patches_backward
    pixels = backward(grad, coarse.cu_seqlens, coarse.cells, list(images.shape), patch_size, False, None)
    assert pixels[2, 2, -1, -1] == 768 / 4096 and pixels[2, 0, 0, 0] == 513 / 4096 and pixels[0, 0, 0, 0] == 1 / 4096
    del pixels
    wide = images[:, :, :, : 958 * patch_size].half()  # 958 x 1024 cells of three images: more than 2^31 patch elements
    fine = sk.SupertokenLayout.uniform(batch, (1024, 958), device="cuda")
    assert fine.capacity * 3 * patch_size**2 > 2**31
    rows = sk.merge_patches(wide, fine, patch_size)
    assert rows[-1].eq(51).all() and not rows[0].any()


def test_a_device_that_is_not_current():
    layout = a_layout(2, (16, 16))
    images = images_for(layout, 16)
    same_where_not_current(lambda device: [sk.merge_patches(images.to(device), layout.to(device), 16)])
