"""merge_patches, embed_patches and their gradients as kernels, against the reference."""

from dataclasses import replace

import pytest
import torch
from interpreter import supervision
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build
from tensors import IMAGE_VIEWS, error_rule, poison, wide_rows
from torch import Tensor
from torch.library import opcheck

import step_kernels as sk
from step_kernels.triton import linear, merge, patches, patches_backward

NAMES = [name for name in AWKWARD if name != "empty_batch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RESAMPLES = ["area", "bilinear"]
MEAN, STD = torch.tensor([0.48, 0.46, 0.41, 0.5]), torch.tensor([0.23, 0.22, 0.27, 0.3])
TINY = PlainLayout((((0, 0, 2), (0, 2, 1), (1, 3, 1)), ((0, 1, 1), (0, 2, 2))), (2, 5), 1)
# One block of every side up to 64, the rest of the grid halted.
EVERY_SIDE = PlainLayout(
    (((0, 0, 64), (0, 64, 32), (0, 96, 16), (0, 112, 8), (0, 120, 4), (0, 124, 2), (0, 126, 1), (16, 112, 16)),),
    (64, 128),
)


def reference(function, *arguments, **named):
    with sk.use_backend("reference"):
        return function(*arguments, **named)


def images_for(
    plain: PlainLayout, patch_size: int = 2, channels: int = 3, dtype: torch.dtype = torch.float32
) -> Tensor:
    rows, columns = plain.grid
    shape = len(plain.images), channels, rows * patch_size, columns * patch_size
    return torch.randint(0, 256, shape).byte() if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def merged_and_gradient(images: Tensor, layout: sk.SupertokenLayout, patch_size: int, cotangent: Tensor, **options):
    if not images.is_floating_point():
        return [sk.merge_patches(images, layout, patch_size, **options)]
    images = images.detach().requires_grad_()
    out = sk.merge_patches(images, layout, patch_size, **options)
    return [out.detach(), *torch.autograd.grad(out, images, cotangent.to(out.dtype))]


def check_merge(plain: PlainLayout, spare: int | None, images: Tensor, patch_size: int, **options) -> None:
    """Values, tail and gradient, although the cotangent's tail is NaN."""
    layout, live = build(plain, spare), len(plain.tokens())
    cotangent = poison(torch.randn(layout.capacity, images.shape[1] * patch_size**2), live)
    ours = merged_and_gradient(images, layout, patch_size, cotangent, **options)
    theirs = reference(merged_and_gradient, images, layout, patch_size, cotangent, **options)
    wide = images.double() if images.is_floating_point() else images.double() / 255
    exact = reference(merged_and_gradient, wide, layout, patch_size, cotangent, **options)
    assert not ours[0][live:].any()
    for result, peer, truth in zip(ours, theirs, exact, strict=False):
        assert result.stride() == peer.stride()
        error_rule(result, peer, truth)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resample", RESAMPLES)
def test_dtypes(dtype, resample):
    plain = AWKWARD["ragged_3x5"]
    check_merge(plain, 3, images_for(plain, dtype=dtype), 2, resample=resample)


@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES])
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
    monkeypatch.setattr(patches, "TILE", tile)
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
    monkeypatch.setattr(patches, "TILE", tile)
    monkeypatch.setattr(patches, "TILES", tiles)
    supervision.shuffle_programs(2)
    layout, images = build(EVERY_SIDE, 3), images_for(EVERY_SIDE, 2)
    for resample in RESAMPLES if tile == 1024 else ["area"]:
        ours = sk.merge_patches(images, layout, 2, resample=resample)
        peer, truth = (reference(sk.merge_patches, x, layout, 2, resample=resample) for x in (images, images.double()))
        error_rule(ours, peer, truth)
    assert set(kernels) == {"merge_patches_kernel"}


@pytest.mark.parametrize("resample", RESAMPLES)
def test_gradient_of_every_side(resample, monkeypatch):
    monkeypatch.setattr(patches_backward, "BACKWARD_CELLS", 128)
    layout, grad = build(EVERY_SIDE, 3), torch.randn(11, 3)
    arguments = layout.cu_seqlens, layout.cells, [1, 3, 64, 128], 1, resample == "bilinear", STD[:3]
    op = torch.ops.step_kernels.merge_patches_backward
    ours, peer, truth = op(grad, *arguments), reference(op, grad, *arguments), reference(op, grad.double(), *arguments)
    error_rule(ours, peer, truth)


def test_large_tokens_in_many_shares(monkeypatch):
    """Every token of side 2 and up is shared out, one tile a program."""
    monkeypatch.setattr(patches, "TILE", 16)
    monkeypatch.setattr(patches, "TILES", 1)
    plain = PlainLayout((((0, 0, 4), (0, 4, 2), (1, 6, 1), (2, 4, 2)), (), ((0, 4, 4), (2, 0, 2))), (5, 9), 2)
    check_merge(plain, 3, images_for(plain, 3, 1), 3)


@pytest.mark.parametrize("resample", RESAMPLES)
def test_few_programs_walk_many_rows(resample, monkeypatch):
    monkeypatch.setattr(patches, "ROW_PROGRAMS", 3)
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


@pytest.mark.parametrize("dtype", DTYPES)
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
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for op, arguments in ((sk.merge_patches, (2,)), (sk.embed_patches, (weight,))):
            options = {"pos_embed": pos_embed} if op is sk.embed_patches else {}
            filled, ours = (op(images, layout, *arguments, tail=tail, **options) for tail in ("zero", "undefined"))
            assert torch.equal(ours[:live], filled[:live])
            assert ours[live:].isnan().all() and not filled[live:].any()
    finally:
        torch.use_deterministic_algorithms(False)


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


def embedding(plain: PlainLayout, dtype: torch.dtype = torch.float32, patch_size: int = 2, width: int = 5):
    shapes = {
        "weight": (width, 3, patch_size, patch_size),
        "bias": (width,),
        "pos_embed": (plain.grid[0] * plain.grid[1], width),
        "prefix": (plain.num_prefix, width),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def embedded_and_gradients(tensors: dict[str, Tensor], layout: sk.SupertokenLayout, cotangent: Tensor, **options):
    tensors = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    out = sk.embed_patches(layout=layout, **tensors, **options)
    inputs = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def check_embed(plain: PlainLayout, spare: int | None, tensors: dict[str, Tensor], **options) -> None:
    layout, live = build(plain, spare), len(plain.tokens())
    cotangent = poison(torch.randn(layout.capacity, tensors["weight"].shape[0]), live)
    ours = embedded_and_gradients(tensors, layout, cotangent, **options)
    theirs = reference(embedded_and_gradients, tensors, layout, cotangent, **options)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    exact = reference(embedded_and_gradients, wide, layout, cotangent, **options)
    assert not ours[0][live:].any()
    for result, peer, truth in zip(ours, theirs, exact, strict=True):
        assert result.stride() == peer.stride()
        error_rule(result, peer, truth)


FORWARD = {True: ["merge_patches_kernel", "reduce_blocks_kernel"]}  # exact mode has the vendor's matmul
FORWARD[False] = ["merge_patches_kernel", "linear_kernel", "reduce_blocks_kernel"]
BACKWARD = ["merge_patches_backward_kernel", "merge_patches_kernel", "expand_blocks_kernel"]


@pytest.mark.parametrize(
    ("name", "spare"), [("ragged_3x5", 0), ("prefix_5", 3), ("holes", None), ("all_halted_prefix", 0)]
)
def test_embed_patches(name, spare, kernels):
    plain = AWKWARD[name]
    supervision.shuffle_programs(3)
    resample = RESAMPLES[spare is None]
    check_embed(plain, spare, {"images": images_for(plain), **embedding(plain)}, resample=resample)
    assert kernels == FORWARD[build(plain, spare).trimmed] + BACKWARD + ["sum_prefix_rows_kernel"] * (
        plain.num_prefix > 0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resample", RESAMPLES)
def test_embed_patches_in_other_dtypes(dtype, resample):
    tensors = {"images": images_for(TINY, dtype=dtype), **embedding(TINY, dtype)}
    check_embed(TINY, 3, tensors, resample=resample, mean=MEAN[:3], std=STD[:3])
    tensors["images"] = images_for(TINY, dtype=torch.uint8)
    check_embed(TINY, 3, tensors, resample=resample, mean=MEAN[:3], std=STD[:3])


@pytest.mark.parametrize("missing", ["bias", "pos_embed", "prefix", "bias pos_embed prefix"])
def test_embed_patches_without(missing):
    tensors = {"images": images_for(TINY), **embedding(TINY)}
    for name in missing.split():
        del tensors[name]
    check_embed(TINY, 3, tensors)


@pytest.mark.parametrize(("expected", "dtype"), [(None, torch.bfloat16), (11, torch.float32), (10**9, torch.bfloat16)])
def test_both_modes_of_the_embedding(expected, dtype, kernels, monkeypatch):
    """NaN in every tail between the kernels of static mode; the count that the host expects decides on tiles and nothing else."""
    plain = AWKWARD["prefix_5"]
    layout, live = replace(build(plain, None), expected_tokens=expected), len(plain.tokens())
    tensors = {"images": images_for(plain, 4, 1, dtype), **embedding(plain, dtype, 4, 16)}
    tensors["weight"] = tensors["weight"][:, :1].contiguous()
    choose, layer, counts, patches_given = linear.choose_tiles, merge.ragged_linear, [], []
    monkeypatch.setattr(linear, "choose_tiles", lambda *given: counts.append(given[2]) or choose(*given))
    monkeypatch.setattr(merge, "ragged_linear", lambda *given: patches_given.append(given[0]) or layer(*given))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        static = sk.embed_patches(layout=layout, **tensors, tail="undefined")
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels == FORWARD[False]
    assert live < layout.capacity and patches_given[0][live:].isnan().all() and static[live:].isnan().all()
    assert counts == [layout.capacity if expected is None else min(expected, layout.capacity)]
    trimmed = sk.embed_patches(layout=layout.trim(), **tensors)
    assert kernels == FORWARD[False] + FORWARD[True] and len(counts) == 1
    peer = reference(sk.embed_patches, layout=layout, **tensors)
    exact = reference(sk.embed_patches, layout=layout, **{name: tensor.double() for name, tensor in tensors.items()})
    for ours in (static[:live], trimmed):
        error_rule(ours, peer[:live], exact[:live])


@pytest.mark.parametrize("needed", range(5))
def test_only_what_is_needed(needed, kernels):
    plain, layout = TINY, build(TINY, 3)
    flags = [index == needed for index in range(5)]
    grad = poison(torch.randn(layout.capacity, 5), len(plain.tokens()))
    arguments = images_for(plain), embedding(plain)["weight"], None, STD[:3], layout.cu_seqlens, layout.cells
    kernels.clear()
    ours = merge.embed_patches_backward(grad, *arguments, False, 1, flags)
    launched = [*BACKWARD[:2], None, BACKWARD[2], "sum_prefix_rows_kernel"][needed]
    assert kernels == ([launched] if launched else [])
    if launched is None:
        kernels.append("the bias needs no kernel of ours")
    backward = torch.ops.step_kernels.embed_patches_backward
    expected = reference(backward, grad, *arguments, False, 1, flags)
    for result, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, truth)
    assert len({id(result) for result in ours}) == 5


@pytest.mark.parametrize("strides", ["expanded", "wide_rows"])
def test_strides_of_what_embed_patches_takes(strides):
    plain, layout = TINY, build(TINY, 3)
    tensors = {name: t if name == "bias" else wide_rows(t) for name, t in embedding(plain).items()}
    tensors["images"] = IMAGE_VIEWS["channels_last"](images_for(plain))
    cotangent = torch.randn(layout.capacity, 5)
    cotangent = wide_rows(cotangent) if strides == "wide_rows" else cotangent[:1, :1].expand_as(cotangent)
    ours = embedded_and_gradients(tensors, layout, cotangent)
    for result, expected in zip(ours, reference(embedded_and_gradients, tensors, layout, cotangent), strict=True):
        torch.testing.assert_close(result, expected)


def test_nothing_to_do(kernels):
    plain = AWKWARD["empty_batch"]
    layout = build(plain)
    tensors = {"images": images_for(plain), **embedding(plain)}
    out, *grads = embedded_and_gradients(tensors, layout, torch.zeros(0, 5))
    assert out.shape == (0, 5) and not any(grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors.values()]
    merged = sk.merge_patches(torch.zeros(2, 0, 8, 8), build(AWKWARD["all_halted"], 3), 2)
    assert merged.shape == (3, 0)
    assert set(kernels) <= {"sum_prefix_rows_kernel", "expand_blocks_kernel"}
    kernels.append("there is nothing to merge")


def test_opcheck():
    plain, layout = TINY, build(TINY, 3)
    metadata = layout.cu_seqlens, layout.cells
    images, parameters = images_for(plain).requires_grad_(), embedding(plain)
    ops = torch.ops.step_kernels
    opcheck(ops.merge_patches.default, (images_for(plain, dtype=torch.uint8), *metadata, 2, True, None, None, True))
    weights = [parameter.requires_grad_() for parameter in parameters.values()]
    opcheck(ops.embed_patches.default, (images, *weights, None, STD[:3], *metadata, False, True, 5))
    grad = torch.randn(layout.capacity, 12)
    opcheck(ops.merge_patches_backward.default, (grad, *metadata, list(images.shape), 2, True, None))
    grad, images, weight = grad[:, :5].contiguous(), images.detach(), weights[0].detach()
    needed = [True, True, False, True, True]
    opcheck(ops.embed_patches_backward.default, (grad, images, weight, None, None, *metadata, False, 1, needed))


def test_compiles():
    plain = TINY
    layout, tensors = build(plain, 3), {"images": images_for(plain), **embedding(plain)}
    cotangent = torch.randn(layout.capacity, 5)
    compiled = torch.compile(
        lambda tensors: sk.embed_patches(layout=layout, **tensors), fullgraph=True, backend="aot_eager"
    )
    for tensor in tensors.values():
        tensor.requires_grad_()
    out = compiled(tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), cotangent)
    expected = reference(embedded_and_gradients, tensors, layout, cotangent)
    for result, truth in zip([out.detach(), *grads], expected, strict=True):
        torch.testing.assert_close(result, truth)
