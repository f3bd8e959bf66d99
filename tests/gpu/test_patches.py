"""merge_patches, embed_patches and their gradients on a GPU against the CPU reference."""

import dataclasses

import pytest
import torch
from gpu.syncs import no_sync
from tensors import IMAGE_VIEWS, error_rule, poison

import step_kernels as sk

pytestmark = pytest.mark.gpu

SIDES = (2, 4, 8, 16, 32, 64)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RESAMPLES = ["area", "bilinear"]
MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.23, 0.22, 0.27])
GRIDS = [(1, (1, 1)), (4, (64, 64)), (3, (17, 33)), (64, (8, 8)), (1, (64, 128))]


def a_layout(batch: int, grid: tuple[int, int], num_prefix: int = 1) -> sk.SupertokenLayout:
    """Random blocks of all sides; untrimmed, on the CPU."""
    scores = [torch.randn(batch, grid[0] // side, grid[1] // side) for side in SIDES]
    with sk.use_backend("reference"):
        return sk.resolve_layout(scores, sides=SIDES, thresholds=0.9, grid=grid, num_prefix=num_prefix)


def images_for(layout: sk.SupertokenLayout, patch_size: int, dtype: torch.dtype) -> torch.Tensor:
    shape = layout.batch_size, 3, layout.grid[0] * patch_size, layout.grid[1] * patch_size
    return torch.randint(0, 256, shape).byte() if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def merged_and_gradient(images, layout, patch_size, cotangent, **options):
    if not images.is_floating_point():
        return [sk.merge_patches(images, layout, patch_size, **options)]
    images = images.detach().requires_grad_()
    out = sk.merge_patches(images, layout, patch_size, **options)
    return [out.detach(), *torch.autograd.grad(out, images, cotangent)]


def check_merge(layout, images, patch_size, **options):
    dtype = images.dtype if images.is_floating_point() else torch.float32
    cotangent = poison(torch.randn(layout.capacity, 3 * patch_size**2).to(dtype), layout.num_tokens)
    wide = images.double() if images.is_floating_point() else images.double() / 255
    with sk.use_backend("reference"):
        plain = merged_and_gradient(images, layout, patch_size, cotangent, **options)
        exact = merged_and_gradient(wide, layout, patch_size, cotangent.double(), **options)
    on_gpu = images.cuda(), layout.to("cuda"), patch_size, cotangent.cuda()
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    merged_and_gradient(*on_gpu, **options)  # compiles
    with no_sync():
        ours = merged_and_gradient(*on_gpu, **options)
    for got, peer, truth in zip(ours, plain, exact, strict=False):
        error_rule(got.cpu(), peer, truth)


@pytest.mark.parametrize(("batch", "grid"), GRIDS)
@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES])
def test_merge_patches(batch, grid, resample, dtype):
    layout = a_layout(batch, grid)
    check_merge(layout, images_for(layout, 16, dtype), 16, resample=resample, mean=MEAN, std=STD)


@pytest.mark.parametrize("patch_size", [1, 3, 8, 14, 32])
def test_patch_sizes(patch_size):
    layout = a_layout(3, (33, 17))
    for resample in RESAMPLES:
        check_merge(layout, images_for(layout, patch_size, torch.float32), patch_size, resample=resample)


@pytest.mark.parametrize("view", IMAGE_VIEWS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_image_strides(view, dtype):
    layout = a_layout(2, (32, 32)).to("cuda")
    images = images_for(layout, 16, dtype).cuda()
    strided = IMAGE_VIEWS[view](images)
    assert strided.stride() != images.stride()
    for resample in RESAMPLES:
        ours, plain = (sk.merge_patches(x, layout, 16, resample=resample).float() for x in (strided, images))
        torch.testing.assert_close(ours, plain, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_side_1_is_copied_bit_by_bit(dtype):
    layout = sk.SupertokenLayout.uniform(2, (8, 8), device="cuda")
    bits = torch.randint(-(2**15), 2**15, (2, 3, 128, 64 * dtype.itemsize), dtype=torch.int16, device="cuda")
    ours = sk.merge_patches(bits.view(dtype), layout, 16)
    with sk.use_backend("reference"):
        expected = sk.merge_patches(bits.view(dtype), layout, 16)
    assert torch.equal(ours.view(torch.int16), expected.view(torch.int16))


def embedding(layout: sk.SupertokenLayout, dtype: torch.dtype, width: int = 192) -> dict[str, torch.Tensor]:
    cells = layout.grid[0] * layout.grid[1]
    shapes = {
        "weight": (width, 3, 16, 16),
        "bias": (width,),
        "pos_embed": (cells, width),
        "prefix": (layout.num_prefix, width),
    }
    return {name: (torch.randn(shape) / shape[0] ** 0.5).to(dtype) for name, shape in shapes.items()}


def embedded_and_gradients(tensors, layout, cotangent, **options):
    tensors = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    out = sk.embed_patches(layout=layout, **tensors, **options)
    inputs = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", ["bytes", "floats"])
@pytest.mark.parametrize("mode", ["exact", "static", "expected"])
def test_embed_patches(resample, dtype, pixels, mode):
    """Plain PyTorch on the GPU as well, as its matmul takes part in both."""
    layout = a_layout(2, (32, 48))
    if mode == "exact":
        layout = layout.trim()
    if mode == "expected":
        layout = dataclasses.replace(layout, expected_tokens=600)
    tensors = {
        "images": images_for(layout, 16, torch.uint8 if pixels == "bytes" else dtype),
        **embedding(layout, dtype),
    }
    cotangent = poison(torch.randn(layout.capacity, 192).to(dtype), layout.num_tokens)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}, layout.to("cuda"), cotangent.cuda()
    with sk.use_backend("reference"):
        exact = embedded_and_gradients(wide, layout, cotangent.double(), resample=resample)
        plain = embedded_and_gradients(*on_gpu, resample=resample)
    embedded_and_gradients(*on_gpu, resample=resample)  # compiles
    with no_sync():
        ours = embedded_and_gradients(*on_gpu, resample=resample)
    assert not ours[0][layout.num_tokens :].any()
    for got, peer, truth in zip(ours, plain, exact, strict=True):
        error_rule(got.cpu(), peer.cpu(), truth)


def test_ten_runs_are_identical():
    layout = a_layout(4, (64, 64)).to("cuda")
    images = images_for(layout, 16, torch.bfloat16).cuda()
    cotangent = torch.randn(layout.capacity, 768, device="cuda").bfloat16()
    runs = [merged_and_gradient(images, layout, 16, cotangent) for _ in range(10)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_batch_mates_do_not_matter():
    layout = a_layout(4, (64, 64))
    images = images_for(layout, 16, torch.float32).cuda()
    merged = sk.merge_patches(images, layout.to("cuda"), 16)
    with sk.use_backend("reference"):
        alone = sk.SupertokenLayout.from_sides(layout.sides()[2:3], num_prefix=1)
    start, stop = layout.cu_seqlens[2:4].tolist()
    ours = sk.merge_patches(images[2:3], alone.to("cuda"), 16)
    assert torch.equal(ours[: stop - start], merged[start:stop])


def test_a_captured_embedding_replays_on_other_images_and_layouts():
    first, second = (a_layout(4, (32, 32)).to("cuda") for _ in range(2))
    layout = sk.SupertokenLayout(first.cu_seqlens.clone(), first.cells.clone(), (32, 32), 1)
    images = images_for(layout, 16, torch.bfloat16).cuda()
    parameters = {name: tensor.cuda() for name, tensor in embedding(layout, torch.bfloat16).items()}
    run = lambda layout: sk.embed_patches(images, layout, **parameters)  # noqa: E731
    run(layout)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(layout)
    layout.cu_seqlens.copy_(second.cu_seqlens)
    layout.cells.copy_(second.cells)
    images.normal_()
    graph.replay()
    assert torch.equal(out, run(second))


def test_more_than_2_to_the_31_elements():
    """Images of 2.4e9 bytes, patches of as many floats, and a gradient of as many pixels in fp16."""
    batch, grid, patch_size = 3, (1024, 1024), 16
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
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
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layout = a_layout(2, (16, 16))
    images = images_for(layout, 16, torch.float32)
    with torch.cuda.device(0):
        second = sk.merge_patches(images.to("cuda:1"), layout.to("cuda:1"), 16)
    assert torch.equal(second.cpu(), sk.merge_patches(images.to("cuda:0"), layout.to("cuda:0"), 16).cpu())
