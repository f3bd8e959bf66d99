"""class_scores as kernels, forward and backward."""

import math

import pytest
import torch
from cases.class_scores import Scores, batch_mates_do_not_matter, scores_case, scores_within_the_rule
from floors import reference
from interpreter import supervision
from tensors import LOW_PRECISION, ROW_VIEWS, error_rule, identical, new_memory_is_nan

import step_kernels as sk
from step_kernels.triton import class_attention

KERNELS = ["class_scores_kernel", "grad_class_vectors_kernel", "class_scores_kernel"]
LENGTHS = (0, 1, 2, 3, 17, 63, 65)


@pytest.fixture
def blocks(monkeypatch):
    """Small tiles and steps, so that there are several of each."""
    monkeypatch.setattr(class_attention, "TOKENS", 32)
    monkeypatch.setattr(class_attention, "CLASSES", 16)
    monkeypatch.setattr(class_attention, "STEP", {"half": 16, "float": 16})


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_forward_and_backward(dtype, blocks, kernels):
    case = scores_case(LENGTHS, 20, 40, dtype, scale=0.3)
    found = case.run()
    assert kernels == KERNELS
    scores_within_the_rule(case, found)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_blocks_of_the_table(dtype, kernels):
    case = scores_case((127, 0, 70), 70, 300, dtype)  # wider than any head of attention
    scores_within_the_rule(case, case.run())
    assert kernels == KERNELS


@pytest.mark.parametrize(("num_classes", "dim"), ((1, 1), (1, 40), (40, 1), (3, 5), (150, 24)))
def test_sizes(num_classes, dim, blocks):
    case = scores_case((5, 0, 20), num_classes, dim, torch.float16)
    scores_within_the_rule(case, case.run())


def test_program_order_does_not_matter(blocks):
    case = scores_case((17, 0, 40), 20, 20, torch.float32, spare=40)
    expected = case.run()
    for seed in (1, 2):
        supervision.shuffle_programs(seed)
        identical(case.run(), expected)


@pytest.mark.parametrize("lengths", ((), (0, 0), (0, 5, 0, 0, 3, 0)))
@pytest.mark.parametrize("spare", (0, 7, 70))
def test_empty_images_and_tails(lengths, spare, blocks, kernels):
    case = scores_case(lengths, 3, 8, torch.float32, spare=spare)
    scores_within_the_rule(case, case.run())
    rows = bool(spare + sum(lengths))
    assert kernels == KERNELS[:1] * rows + KERNELS[1:2] * bool(lengths) + KERNELS[2:] * rows
    kernels.append("without images and rows there is nothing to launch")


def test_no_classes(kernels):
    """The gradient of the tokens is zero; someone must write that."""
    case = scores_case((3, 2), 0, 8, torch.float32)
    with new_memory_is_nan():
        scores, grad_q, grad_k = case.run()
    assert scores.shape == (8, 0) and grad_q.shape == (2, 0, 8)
    assert grad_k.shape == (8, 8) and not grad_k.any() and kernels == KERNELS[2:]


@pytest.mark.parametrize("which", range(2))
def test_gradient_of_one_argument_alone(which, blocks, kernels):
    case = scores_case((17, 0, 5), 5, 20, torch.float32)
    inputs = list(case.leaves())
    expected = case.run()[1 + which]
    kernels.clear()
    inputs[1 - which] = inputs[1 - which].detach()
    scores = sk.class_scores(*inputs, case.cu_seqlens)
    assert torch.equal(torch.autograd.grad(scores, inputs[which], case.cotangent)[0], expected)
    assert kernels == [KERNELS[0], KERNELS[1 + which]]


def test_vectors_shared_by_the_images(blocks):
    case = scores_case((17, 0, 40), 5, 20, torch.float32)
    case.q = case.q[:1].expand_as(case.q)
    shared = case.run()
    case.q = case.q.clone()
    identical(shared, case.run())


def test_more_images_than_are_counted_at_a_time(monkeypatch, blocks):
    monkeypatch.setattr(class_attention, "IMAGES", 4)
    case = scores_case((3, 0, 1, 2, 5, 1, 0, 0, 0, 7), 2, 8, torch.float32)
    scores_within_the_rule(case, case.run())


def test_an_undefined_tail_is_not_written(blocks):
    """Outputs start as NaN here; rows past the live count still hold it afterwards."""
    case = scores_case((5, 0, 12), 3, 20, torch.float32, spare=40)
    expected = case.run()
    with new_memory_is_nan():
        found = case.run(tail="undefined")
    for index in (0, 2):
        assert torch.equal(found[index][:17], expected[index][:17]) and found[index][17:].isnan().all()
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_nan_elsewhere_does_not_leak(value, blocks):
    case = scores_case((17, 40, 5), 3, 20, torch.bfloat16)
    clean = case.run()
    case.q[1], case.k[17:57], case.cotangent[17:57] = value, value, value
    found = case.run()
    for ours, theirs, pieces in zip(
        found, clean, ((slice(17), slice(57, 62)), (0, 2), (slice(17), slice(57, 62))), strict=True
    ):
        assert all(torch.equal(ours[piece], theirs[piece]) for piece in pieces)
    assert not found[0][17:57].isfinite().any()


def test_half_precision_sums_do_not_overflow(blocks):
    """k . q reaches 2.6e6 here, forty times what fp16 holds; scaled, the scores are 3.2e4 and fit."""
    case = scores_case((6, 40), 3, 64, torch.float16, scale=1 / 80)
    case.q, case.k = (case.q + 200).round(), (case.k + 200).round()
    found = case.run()
    assert all(x.isfinite().all() for x in found)
    plain, truth = reference(case.run), reference(case.to(torch.float64).run)
    for ours, peer, exact in zip(found, plain, truth, strict=True):
        error_rule(ours, peer, exact)


@pytest.mark.parametrize("view", (*ROW_VIEWS, "columns"))
def test_strides(view, blocks):
    shapes = (2, 3, 20), (22, 20), (22, 3)
    views = {**ROW_VIEWS, "columns": lambda x: x}
    strided = [views[view](torch.randn(shape)) for shape in shapes]
    packed = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    if view == "columns":  # autograd may pass back any strides
        strided[2] = strided[2].T.contiguous().T
    identical(Scores((17, 5), *strided).run(), Scores((17, 5), *packed).run())


def test_gradients_without_strides(blocks):
    """What ``sum`` passes back: one number expanded over everything."""
    case = scores_case((17, 5), 3, 20, torch.float32, spare=0)
    case.cotangent = torch.tensor(1.5).expand(case.cotangent.shape)
    scores_within_the_rule(case, case.run())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_mates_do_not_matter(dtype, blocks):
    batch_mates_do_not_matter(scores_case((17, 0, 40, 1), 3, 20, dtype, spare=0))


def far_apart(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The same with the third entry of a dimension past 2^31 elements; memory that nobody touches costs nothing."""
    strides = list(values.stride())
    strides[dim] = 2**30 + 64  # fits int32, twice that does not
    size = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1
    return torch.empty(size, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(("name", "dim"), (("q", 0), ("q", 1), ("k", 0), ("cotangent", 0), ("cotangent", 1)))
def test_offsets_past_2_to_the_31(name, dim, blocks):
    """Of images, rows and (in the columns of q, and in a gradient) of what a step sums over."""
    case = scores_case((1, 1, 1), 3, 2, torch.bfloat16, spare=0)
    expected = case.run()
    setattr(case, name, far_apart(getattr(case, name), dim))
    identical(case.run(), expected)
