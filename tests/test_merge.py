"""merge_patches, embed_patches and merge_tokens against loops over blocks and pixels."""

from __future__ import annotations

from functools import partial

import brute_force
import pytest
import torch
import torch.nn.functional as F
from cases.merge import RESAMPLES, embedding, images_for
from floors import refused
from hypothesis import given
from hypothesis import strategies as st
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build
from random_layouts import plain_layouts
from tensors import IMAGE_VIEWS, LOW_PRECISION, ROW_VIEWS, agree, close, error_rule, rule_with_gradients
from torch import Tensor

import step_kernels as sk

BYTES = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
MEAN, STD = [0.48, 0.46, 0.41], [0.23, 0.22, 0.27]
SMALL = ("prefix_5", "ragged_3x5", "image_emptied", "holes")


make_images = partial(images_for, dtype=torch.float64)
make_embedding = partial(embedding, dtype=torch.float64)


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_merge_patches(name: str, spare: int | None, resample: str) -> None:
    plain = AWKWARD[name]
    images = make_images(plain).requires_grad_()
    result = sk.merge_patches(images, build(plain, spare), 2, resample=resample)
    agree(result, brute_force.merge_patches(images, plain, 2, resample), [images])


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_embed_patches(name: str, spare: int | None, resample: str) -> None:
    plain = AWKWARD[name]
    tensors = {"images": make_images(plain), **make_embedding(plain)}
    for tensor in tensors.values():
        tensor.requires_grad_()
    result = sk.embed_patches(layout=build(plain, spare), resample=resample, **tensors)
    truth = brute_force.embed_patches(layout=plain, resample=resample, **tensors)
    agree(result, truth, list(tensors.values()))


@pytest.mark.parametrize("spare", SPARE_ROWS)
@pytest.mark.parametrize("name", AWKWARD)
def test_merge_tokens(name: str, spare: int | None) -> None:
    plain = AWKWARD[name]
    tokens = torch.randn(len(plain.images), plain.grid[0] * plain.grid[1], 5, dtype=torch.float64, requires_grad=True)
    prefix = torch.randn(plain.num_prefix, 5, dtype=torch.float64, requires_grad=True)
    layout = build(plain, spare)
    agree(
        sk.merge_tokens(tokens, layout, prefix=prefix),
        brute_force.merge_tokens(tokens, plain, prefix),
        [tokens, prefix],
    )
    close(sk.merge_tokens(tokens, layout)[: len(plain.tokens())], brute_force.merge_tokens(tokens, plain))


@given(plain_layouts(), st.sampled_from(RESAMPLES), st.sampled_from(SPARE_ROWS), st.sampled_from([1, 2, 3]))
def test_generated_layouts(plain: PlainLayout, resample: str, spare: int | None, patch_size: int) -> None:
    tensors = {"images": make_images(plain, patch_size), **make_embedding(plain, patch_size=patch_size)}
    for tensor in tensors.values():
        tensor.requires_grad_()
    result = sk.embed_patches(layout=build(plain, spare), resample=resample, **tensors)
    truth = brute_force.embed_patches(layout=plain, resample=resample, **tensors)
    agree(result, truth, list(tensors.values()))


@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_specification_is_interpolate(resample: str) -> None:
    """Both rules are what the design says in terms of torch: avg_pool2d and interpolate(scale_factor=1/side)."""
    for side in (1, 2, 4, 8, 16):
        plain = PlainLayout((((0, 0, side),),), (side, side))
        images = make_images(plain, patch_size=3)
        if resample == "area":
            expected = F.avg_pool2d(images, side)
        else:
            expected = F.interpolate(images, scale_factor=1 / side, mode="bilinear", align_corners=False)
        close(brute_force.merge_patches(images, plain, 3, resample), expected.flatten(1))


@pytest.mark.parametrize("missing", ("bias", "pos_embed", "prefix"))
def test_embed_patches_without(missing: str) -> None:
    plain = AWKWARD["prefix_5"]
    tensors = {"images": make_images(plain), **make_embedding(plain)}
    del tensors[missing]
    close(sk.embed_patches(layout=build(plain), **tensors), brute_force.embed_patches(layout=plain, **tensors))


@pytest.mark.parametrize("view", IMAGE_VIEWS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.uint8))
def test_image_strides(view: str, dtype: torch.dtype) -> None:
    plain = AWKWARD["tall_8x3"]
    layout = build(plain, 3)
    images = make_images(plain) if dtype.is_floating_point else torch.randint(0, 256, make_images(plain).shape).byte()
    strided = IMAGE_VIEWS[view](images)
    assert strided.stride() != images.stride()
    embedding = {
        name: tensor.float() if dtype == torch.uint8 else tensor for name, tensor in make_embedding(plain).items()
    }
    for resample in RESAMPLES:
        options = {"resample": resample, "mean": MEAN, "std": STD}
        # Memory order decides the order of summation, so the last bits may differ.
        tolerance = 1e-12 if dtype.is_floating_point else 1e-6
        for op, parameters in ((sk.merge_patches, {"patch_size": 2}), (sk.embed_patches, embedding)):
            close(op(strided, layout, **parameters, **options), op(images, layout, **parameters, **options), tolerance)


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_token_and_parameter_strides(view: str) -> None:
    plain = AWKWARD["tall_8x3"]
    layout = build(plain)
    change = ROW_VIEWS[view]
    tokens, prefix = torch.randn(2, 24, 5), torch.randn(1, 5)
    assert torch.equal(
        sk.merge_tokens(change(tokens), layout, prefix=change(prefix)), sk.merge_tokens(tokens, layout, prefix=prefix)
    )
    embedding, images = make_embedding(plain), make_images(plain)
    strided = {name: tensor if name == "bias" else change(tensor) for name, tensor in embedding.items()}
    close(sk.embed_patches(images, layout, **strided), sk.embed_patches(images, layout, **embedding))


@pytest.mark.parametrize("mean, std", [(MEAN, STD), (torch.tensor(MEAN), torch.tensor(STD))])
@pytest.mark.parametrize("resample", RESAMPLES)
def test_bytes_are_normalised_on_the_way(resample: str, mean: list[float], std: list[float]) -> None:
    plain = AWKWARD["prefix_5"]
    images = torch.randint(0, 256, make_images(plain).shape).byte()
    layout = build(plain, 3)
    merged = sk.merge_patches(images, layout, 2, resample=resample, mean=mean, std=std)
    assert merged.dtype == torch.float32
    truth = brute_force.merge_patches(images, plain, 2, resample, MEAN, STD)
    offset = torch.tensor(MEAN).view(-1, 1, 1)
    normal = ((images.float() / 255 - offset) / torch.tensor(STD).view(-1, 1, 1)).double()
    in_float = brute_force.merge_patches(normal, plain, 2, resample).float()
    error_rule(merged[: len(truth)], in_float, truth)
    # Two roundings of the normalisation and a sum of 12 products in fp32.
    embedding = make_embedding(plain)
    truth = brute_force.embed_patches(images, plain, **embedding, resample=resample, mean=MEAN, std=STD)
    single = {name: tensor.float() for name, tensor in embedding.items()}
    result = sk.embed_patches(images, layout, **single, resample=resample, mean=mean, std=std)
    assert result.dtype == torch.float32
    close(result[: len(truth)], truth, 2e-6)


@pytest.mark.parametrize("mean, std", [(MEAN, STD), (MEAN, None), (None, STD)])
def test_float_images_are_normalised_too(mean: list[float] | None, std: list[float] | None) -> None:
    plain = AWKWARD["ragged_3x5"]
    images = make_images(plain).requires_grad_()
    result = sk.merge_patches(images, build(plain, 3), 2, mean=mean, std=std)
    agree(result, brute_force.merge_patches(images, plain, 2, "area", mean, std), [images])


@pytest.mark.parametrize("resample", RESAMPLES)
def test_bytes_without_statistics(resample: str) -> None:
    plain = AWKWARD["ragged_3x5"]
    images = torch.randint(0, 256, make_images(plain).shape).byte()
    result = sk.merge_patches(images, build(plain), 2, resample=resample)
    close(result, brute_force.merge_patches(images, plain, 2, resample), 1e-6)


def plain_pytorch(plain: PlainLayout, images: Tensor, embedding: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge and embed the way a user would, block by block in the tensors' own dtype."""
    patch_size, dim = embedding["weight"].shape[-1], embedding["weight"].shape[0]
    positions = embedding["pos_embed"].T.reshape(1, dim, *plain.grid)
    merged, embedded = [], []
    for index, (image, row, column, side) in enumerate(plain.tokens()):
        if side == 0:
            merged.append(images.new_zeros(images.shape[1] * patch_size**2))
            embedded.append(embedding["prefix"][index - plain.cu_seqlens()[image]])
            continue
        top, left, size = row * patch_size, column * patch_size, side * patch_size
        pixels = F.avg_pool2d(images[image : image + 1, :, top : top + size, left : left + size], side)
        position = F.avg_pool2d(positions[:, :, row : row + side, column : column + side], side)
        merged.append(pixels.flatten())
        embedded.append(F.conv2d(pixels, embedding["weight"], embedding["bias"]).flatten() + position.flatten())
    return torch.stack(merged), torch.stack(embedded)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ("prefix_5", "all_sides_16", "odd_17x33"))
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    plain = AWKWARD[name]
    images = images_for(plain, dtype=dtype).requires_grad_()
    embedding = {n: tensor.to(dtype).requires_grad_() for n, tensor in make_embedding(plain, width=8).items()}
    tensors = [images, *embedding.values()]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    layout = build(plain)
    rivals = plain_pytorch(plain, images, embedding)
    ours = sk.merge_patches(images, layout, 2), sk.embed_patches(images, layout, **embedding)
    named = dict(zip(embedding, exact[1:], strict=True))
    truths = brute_force.merge_patches(exact[0], plain, 2), brute_force.embed_patches(exact[0], plain, **named)
    for result, rival, truth in zip(ours, rivals, truths, strict=True):
        rule_with_gradients(result, rival, truth, tensors, exact)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_tokens(dtype: torch.dtype) -> None:
    plain = AWKWARD["all_sides_16"]
    tokens = torch.randn(2, 256, 5, dtype=torch.float64).to(dtype).requires_grad_()
    exact = tokens.detach().double().requires_grad_()
    on_grid = tokens.unflatten(1, plain.grid)
    rival = torch.stack(
        [
            on_grid[image, row : row + side, column : column + side].mean(dim=(0, 1)) if side else tokens.new_zeros(5)
            for image, row, column, side in plain.tokens()
        ]
    )
    result, truth = sk.merge_tokens(tokens, build(plain)), brute_force.merge_tokens(exact, plain)
    rule_with_gradients(result, rival, truth, [tokens], [exact])


def test_half_precision_sums_do_not_overflow() -> None:
    plain = PlainLayout((((0, 0, 64),),), (64, 64))
    images = torch.full((1, 3, 64, 64), 6e4, dtype=torch.float16)
    layout = build(plain)
    assert torch.equal(sk.merge_patches(images, layout, 1), torch.full((1, 3), 6e4, dtype=torch.float16))
    tokens = images.flatten(2).transpose(1, 2)
    assert torch.equal(sk.merge_tokens(tokens.contiguous(), layout), torch.full((1, 3), 6e4, dtype=torch.float16))


@pytest.mark.parametrize("resample", RESAMPLES)
def test_batch_mates_do_not_matter(resample: str) -> None:
    plain = AWKWARD["ragged_3x5"]
    images = images_for(plain)
    starts = plain.cu_seqlens()
    together = sk.merge_patches(images, build(plain), 2, resample=resample)
    tokens = images.flatten(2).transpose(1, 2)[:, :15].contiguous()
    pooled = sk.merge_tokens(tokens, build(plain))
    for index, blocks in enumerate(plain.images):
        alone = build(PlainLayout((blocks,), plain.grid))
        rows = slice(starts[index], starts[index + 1])
        assert torch.equal(sk.merge_patches(images[index : index + 1], alone, 2, resample=resample), together[rows])
        assert torch.equal(sk.merge_tokens(tokens[index : index + 1], alone), pooled[rows])


def test_nan_stays_in_its_block() -> None:
    plain = AWKWARD["ragged_3x5"]
    images = make_images(plain)
    images[0, 1, 0, 0] = float("nan")
    merged = sk.merge_patches(images, build(plain), 2)
    tokens = images[:, :, ::2, ::2].flatten(2).transpose(1, 2).contiguous()
    for result in (merged, sk.merge_tokens(tokens, build(plain))):
        assert result.isnan().any(1).nonzero().flatten().tolist() == [0]


def test_undefined_tail_leaves_live_rows_alone() -> None:
    plain = AWKWARD["prefix_5"]
    layout, live = build(plain, None), len(plain.tokens())
    images, embedding = make_images(plain), make_embedding(plain)
    tokens = torch.randn(2, 24, 5)
    for call in (
        lambda tail: sk.merge_patches(images, layout, 2, tail=tail),
        lambda tail: sk.embed_patches(images, layout, **embedding, tail=tail),
        lambda tail: sk.merge_tokens(tokens, layout, tail=tail),
    ):
        assert torch.equal(call("undefined")[:live], call("zero")[:live])


PLAIN = PlainLayout((((0, 0, 2), (0, 2, 1), (1, 2, 1)),), (2, 3), 1)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"images": "x"}, TypeError, ["images", "x"]),
        ({"images": torch.zeros(3, 4, 6)}, ValueError, ["images", "3, 4, 6"]),
        ({"images": torch.zeros(2, 3, 4, 6)}, ValueError, ["images", "1", "2, 3, 4, 6"]),
        ({"images": torch.zeros(1, 3, 4, 7)}, ValueError, ["images", "4, 6", "4, 7"]),
        ({"images": torch.zeros(1, 3, 4, 6, dtype=torch.int32)}, TypeError, ["images", "uint8", "int32"]),
        ({"layout": None}, TypeError, ["layout", "None"]),
        ({"resample": "nearest"}, ValueError, ["resample", "area", "nearest"]),
        ({"mean": [0.5]}, ValueError, ["mean", "3", "1"]),
        ({"std": 0.5}, TypeError, ["std", "0.5"]),
        ({"std": [0.5, 0, 0.5]}, ValueError, ["std", "positive", "[0.5, 0.0, 0.5]"]),
        ({"std": torch.tensor([0.5, -1, 0.5])}, ValueError, ["std", "positive", "[0.5, -1.0, 0.5]"]),
        ({"mean": (0.5, float("nan"), 0.5)}, ValueError, ["mean", "finite", "[0.5, nan, 0.5]"]),
        ({"mean": [123.7, 116.3, 103.5], "images": BYTES}, ValueError, ["mean", "0 to 1", "divided by 255", "123.7"]),
        ({"std": torch.tensor([58.4, 57.1, 57.4]), "images": BYTES}, ValueError, ["std", "divided by 255", "57.4"]),
        ({"tail": 0}, ValueError, ["tail", "zero", "0"]),
        ({"patch_size": 0}, ValueError, ["patch_size", "0"]),
        ({"patch_size": 2.0}, TypeError, ["patch_size", "2.0"]),
        ({"weight": torch.zeros(5, 3, 2, 3)}, ValueError, ["weight", "2, 3"]),
        ({"weight": torch.zeros(5, 4, 2, 2)}, ValueError, ["weight", "3", "4"]),
        ({"weight": torch.zeros(5, 3, 2, 2, dtype=torch.float16)}, TypeError, ["images", "float16", "float32"]),
        ({"bias": torch.zeros(4)}, ValueError, ["bias", "5", "4"]),
        ({"pos_embed": torch.zeros(7, 5)}, ValueError, ["pos_embed", "6", "7, 5"]),
        ({"prefix": torch.zeros(2, 5)}, ValueError, ["prefix (layout.num_prefix rows)", "1, 5", "2, 5"]),
        ({"tokens": torch.zeros(1, 7, 5)}, ValueError, ["tokens", "6", "1, 7, 5"]),
        ({"tokens": torch.zeros(1, 5, 6).transpose(1, 2)}, ValueError, ["tokens", "contiguous"]),
        ({"tokens": torch.zeros(1, 6, 5, dtype=torch.int32)}, TypeError, ["tokens", "int32"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    """Each op that takes the changed argument refuses it."""
    good = {"layout": build(PLAIN), "tail": "zero"}
    on_images = {**good, "images": torch.zeros(1, 3, 4, 6), "resample": "area", "mean": None, "std": None}
    parameters = {name: tensor.float() for name, tensor in make_embedding(PLAIN).items()}
    calls = {
        sk.merge_patches: {**on_images, "patch_size": 2},
        sk.embed_patches: {**on_images, **parameters},
        sk.merge_tokens: {**good, "tokens": torch.zeros(1, 6, 5), "prefix": torch.zeros(1, 5)},
    }
    concerned = {op: arguments for op, arguments in calls.items() if set(change) <= set(arguments)}
    assert concerned
    for op, arguments in concerned.items():
        with refused(error, words):
            op(**{**arguments, **change})
