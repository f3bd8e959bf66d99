"""embed_patches and its gradients as kernels, against the reference."""

from dataclasses import replace

import pytest
import torch
from cases.merge import MEAN, RESAMPLES, STD, TINY, embedded, embedding, images_for
from floors import double, hold, reference
from interpreter import supervision
from layouts import AWKWARD, PlainLayout, build
from tensors import IMAGE_VIEWS, LOW_PRECISION, error_rule, new_memory_is_nan, poison, wide_rows
from torch import Tensor

import step_kernels as sk
from step_kernels.triton.linear import launch as linear
from step_kernels.triton.merge import launch as merge


def check_embed(plain: PlainLayout, spare: int | None, tensors: dict[str, Tensor], **options) -> None:
    layout, live = build(plain, spare), len(plain.tokens())
    weight = tensors["weight"]
    cotangent = poison(torch.randn(layout.capacity, len(weight)).to(weight.dtype), live)
    out, *_ = hold(embedded, tensors, layout, cotangent, options)
    assert not out[live:].any()


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


@pytest.mark.parametrize("dtype", LOW_PRECISION)
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
    with new_memory_is_nan():
        static = sk.embed_patches(layout=layout, **tensors, tail="undefined")
    assert kernels == FORWARD[False]
    assert live < layout.capacity and patches_given[0][live:].isnan().all() and static[live:].isnan().all()
    assert counts == [layout.capacity if expected is None else min(expected, layout.capacity)]
    trimmed = sk.embed_patches(layout=layout.trim(), **tensors)
    assert kernels == FORWARD[False] + FORWARD[True] and len(counts) == 1
    peer = reference(sk.embed_patches, layout=layout, **tensors)
    exact = reference(sk.embed_patches, layout=layout, **double(tensors))
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
    ours = embedded(tensors, layout, cotangent, {})
    for result, expected in zip(ours, reference(embedded, tensors, layout, cotangent, {}), strict=True):
        torch.testing.assert_close(result, expected)


def test_nothing_to_do(kernels):
    plain = AWKWARD["empty_batch"]
    layout = build(plain)
    tensors = {"images": images_for(plain), **embedding(plain)}
    out, *grads = embedded(tensors, layout, torch.zeros(0, 5), {})
    assert out.shape == (0, 5) and not any(grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors.values()]
    assert set(kernels) <= {"sum_prefix_rows_kernel", "expand_blocks_kernel"}
    kernels.append("there is nothing to merge")
