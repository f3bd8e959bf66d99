"""class_attention as kernels, forward and backward, through the output and the scores."""

import math

import pytest
import torch
from cases.cross_attention import (
    classes,
    classes_of,
    classes_within_the_rule,
    images_of_classes_do_not_matter_to_each_other,
)
from floors import reference
from interpreter import supervision
from tensors import LOW_PRECISION, ROW_VIEWS, error_rule, identical, new_memory_is_nan, swapped

import step_kernels as sk
from step_kernels.triton import class_attention
from step_kernels.triton.cross_attention import launch

FORWARD = ["cross_attention_kernel"]
SCORES = ["class_scores_kernel"]
BACKWARD = ["grad_queries_kernel", "grad_keys_kernel"]
LENGTHS = (0, 1, 2, 3, 17, 63, 65)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_forward_and_backward(dtype, cross_tiles, kernels):
    case = classes(LENGTHS, 20, 2, 16, dtype)
    found = case.run()
    assert kernels == FORWARD + SCORES + BACKWARD
    classes_within_the_rule(case, found)
    kernels.clear()
    assert torch.equal(case.run(scores=False)[0], found[0])
    assert kernels == FORWARD + BACKWARD


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_blocks_of_the_table(dtype):
    case = classes((127, 0, 70), 70, 1, 64, dtype)
    classes_within_the_rule(case, case.run())


@pytest.mark.parametrize("own, step", ((16, 32), (64, 16), (16, 16)))
def test_other_blocks(own, step, cross_tiles):
    cross_tiles(own, step)
    case = classes((5, 40), 20, 1, 16, torch.float32)
    classes_within_the_rule(case, case.run())


def test_program_order_does_not_matter(cross_tiles):
    case = classes((17, 0, 40), 20, 2, 16, torch.float32, spare=40)
    expected = case.run()
    for seed in (1, 2):
        supervision.shuffle_programs(seed)
        identical(case.run(), expected)


@pytest.mark.parametrize("dim", (1, 5, 24, 64, 72, 80, 128, 256))
def test_head_dimensions(dim, cross_tiles):
    case = classes((17, 3), 3, 2, dim, torch.float16)
    classes_within_the_rule(case, case.run())


@pytest.mark.parametrize("num_classes, heads", ((1, 1), (2, 3), (150, 1), (3, 16)))
def test_numbers_of_classes_and_heads(num_classes, heads, cross_tiles):
    case = classes((5, 2), num_classes, heads, 16, torch.float32)
    classes_within_the_rule(case, case.run())


@pytest.mark.parametrize("lengths", ((), (0,), (0, 0, 0), (0, 5, 0, 0, 3, 0)))
@pytest.mark.parametrize("spare", (0, 7, 70))
def test_empty_images_and_tails(lengths, spare, cross_tiles, kernels):
    case = classes(lengths, 3, 2, 8, torch.float32, spare=spare)
    found = case.run()
    assert not found[0][[n == 0 for n in lengths]].any()
    if sum(lengths):
        classes_within_the_rule(case, found)
    else:
        assert not any(x.any() for x in found)
    expected = FORWARD * bool(lengths) + SCORES * bool(spare + sum(lengths))
    expected += BACKWARD[:1] * bool(lengths) + BACKWARD[1:] * bool(spare + sum(lengths))
    assert kernels == expected
    kernels.append("without images and rows there is nothing to launch")


@pytest.mark.parametrize("shape", ((2, 0, 2, 8), (2, 3, 0, 8)))
def test_no_classes_or_no_heads(shape, kernels):
    """Without classes the gradients of the tokens are zero; someone must write that."""
    q = torch.zeros(shape, requires_grad=True)
    k = torch.zeros(5, *shape[2:], requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    with new_memory_is_nan():
        out, scores = sk.class_attention(q, k, k, cu_seqlens, 3, return_scores=True)
        grads = torch.autograd.grad([out, scores], [q, k], [torch.ones_like(out), torch.ones_like(scores)])
    assert out.shape == shape and scores.shape == (5, shape[1]) and grads[1].shape == k.shape
    assert not any(x.any() for x in (out, scores, *grads))
    kernels.append("there may be nothing to launch")


@pytest.mark.parametrize("used", (0, 1))
def test_gradients_through_one_of_the_two(used, cross_tiles, kernels):
    """The output or the scores."""
    case = classes((17, 0, 40), 5, 2, 16, torch.float32)

    def run():
        result = sk.class_attention(*case.inputs, case.cu_seqlens, 40, return_scores=True)[used]
        return torch.autograd.grad(result, case.inputs, case.cotangents[used], allow_unused=True)

    found = run()
    assert kernels == FORWARD + SCORES + BACKWARD
    for ours, theirs in zip(found, reference(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_queries_shared_by_the_images(cross_tiles):
    """A parameter, expanded over the batch: nothing is copied, and its gradient is the sum over images."""
    case = classes((17, 0, 40), 5, 2, 16, torch.float32)
    parameter = torch.randn(5, 2, 16)
    expanded = parameter.expand(3, -1, -1, -1)
    shared, copied = (classes_of(case.lengths, [q, *case.tensors[1:]]) for q in (expanded, expanded.clone()))
    identical(shared.run(), copied.run())
    parameter.requires_grad_()
    out = sk.class_attention(parameter.expand(3, -1, -1, -1), *case.inputs[1:], case.cu_seqlens, 40)
    (grad,) = torch.autograd.grad(out, parameter, case.cotangents[0])
    torch.testing.assert_close(grad, copied.run(scores=False)[1].sum(0))


def test_more_images_than_are_counted_at_a_time(monkeypatch, cross_tiles):
    monkeypatch.setattr(launch, "IMAGES", 4)
    monkeypatch.setattr(class_attention, "IMAGES", 4)
    case = classes((3, 0, 1, 2, 5, 1, 0, 0, 0, 7), 2, 1, 8, torch.float32)
    classes_within_the_rule(case, case.run())


def test_an_undefined_tail_is_not_written(cross_tiles):
    """Rows past the live count still hold NaN afterwards."""
    case = classes((5, 0, 12), 3, 2, 16, torch.float32, spare=40)
    expected = case.run()
    with new_memory_is_nan():
        found = case.run(tail="undefined")
    for index in (1, 3, 4):
        assert torch.equal(found[index][:17], expected[index][:17]) and found[index][17:].isnan().all()
    identical([found[0], found[2]], [expected[0], expected[2]])


@pytest.mark.parametrize("where", ("tail", "another image"))
def test_nan_elsewhere_does_not_leak(where, cross_tiles):
    case = classes((17, 40, 5), 3, 2, 16, torch.bfloat16, spare=40)
    clean = case.run()
    rows, image = (slice(17, 57), slice(1, 2)) if where == "another image" else (slice(62, None), slice(3, None))
    for value in (math.nan, math.inf):
        spoilt = [x.clone() for x in case.tensors]
        for x, piece in zip(spoilt, (image, rows, rows, image, rows), strict=True):
            x[piece] = value
        found = classes_of(case.lengths, spoilt).run()
        for ours, theirs, per_image in zip(found, clean, (True, False, True, False, False), strict=True):
            for kept in (0, 2) if per_image else (slice(17), slice(57, 62)):
                assert torch.equal(ours[kept], theirs[kept])


def test_a_nan_score_makes_its_row_nan(cross_tiles):
    case = classes((20, 30), 3, 2, 16, torch.float32)
    clean = case.run()
    case.inputs[0].data[0, 1, 0, 2] = math.nan
    found = case.run()
    assert found[0][0, 1, 0].isnan().all() and found[1][:20, 1].isnan().all()
    found[0][0, 1, 0], found[1][:20, 1] = clean[0][0, 1, 0], clean[1][:20, 1]
    identical(found[:2], clean[:2])
    case.inputs[1].data[25, 1, 0] = math.nan
    found = case.run()
    assert found[0][1, :, 1].isnan().all() and torch.equal(found[0][1, :, 0], clean[0][1, :, 0])
    assert found[1][25].isnan().all() and torch.equal(found[1][26:], clean[1][26:])


def test_half_precision_sums_do_not_overflow(cross_tiles):
    """q . k reaches 2.6e6 here, forty times what fp16 holds; scaled, the scores are 3.2e4 and fit."""
    case = classes((6, 40), 3, 2, 64, torch.float16, scale=1 / 80)
    for x in case.inputs[:2]:
        x.data = (x.data + 200).round()  # sums of integers are exact in any order
    found = case.run()
    assert all(x.isfinite().all() for x in found)
    plain, truth = reference(case.run), reference(case.to(torch.float64).run)
    for ours, peer, exact in zip(found[:2], plain[:2], truth[:2], strict=True):
        error_rule(ours, peer, exact)


def test_a_log_sum_exp_below_what_fp16_can_raise(cross_tiles):
    """All scores are near -64: a key past the end, with score zero, would weigh e^64 if it were not left out."""
    case = classes((5, 20), 20, 1, 16, torch.float16)
    case.inputs[0].data += 4
    case.inputs[1].data -= 4
    classes_within_the_rule(case, case.run())


@pytest.mark.parametrize("scale", (-0.7, 0.0, 3.0))
def test_scales(scale, cross_tiles):
    case = classes((17, 40), 20, 2, 16, torch.float32, scale=scale)
    classes_within_the_rule(case, case.run())


VIEWS = {**ROW_VIEWS, "swapped": swapped, "shared": lambda x: x[:1].expand_as(x)}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, cross_tiles):
    shapes = (2, 3, 2, 16), (22, 2, 16), (22, 2, 16), (2, 3, 2, 16), (22, 3)
    strided = [VIEWS[view](torch.randn(shape)) for shape in shapes]
    packed = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    identical(classes_of((17, 5), strided).run(), classes_of((17, 5), packed).run())


def test_gradients_without_strides(cross_tiles):
    """What ``sum`` passes back: one number expanded over everything."""
    case = classes((17, 5), 3, 2, 16, torch.float32, spare=0)
    case.cotangents = [torch.tensor(1.5).expand(x.shape) for x in case.cotangents]
    classes_within_the_rule(case, case.run())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_mates_do_not_matter(dtype, cross_tiles):
    images_of_classes_do_not_matter_to_each_other(classes((17, 0, 40, 1), 3, 1, 16, dtype, spare=0))


def far_apart(values: torch.Tensor, stride: int) -> torch.Tensor:
    """The same with entries of the first dimension far apart; memory that nobody touches costs nothing."""
    size = (values.shape[0] - 1) * stride + values[0].numel()
    strides = (stride, *values[0].contiguous().stride())
    return torch.empty(size, dtype=values.dtype).as_strided(values.shape, strides).copy_(values.detach())


def test_offsets_past_2_to_the_31(cross_tiles):
    case = classes((1, 2), 3, 2, 16, torch.bfloat16, spare=0)
    expected = case.run()
    q, grad = (far_apart(x, 2**31 + 64) for x in (case.inputs[0], case.cotangents[0]))
    k, v, grad_scores = (far_apart(x, 2**30 + 8) for x in (*case.inputs[1:], case.cotangents[1]))
    out, scores, lse = torch.ops.step_kernels.class_attention(q, k, v, case.cu_seqlens, None, True, True, True)
    arguments = (grad, grad_scores, q, k, v, far_apart(out, 2**31 + 64), lse, case.cu_seqlens, None, True)
    identical([out, scores, *torch.ops.step_kernels.class_attention_backward(*arguments)], expected)


def test_log_sum_exp(cross_tiles):
    case = classes((17, 0, 40), 20, 3, 16, torch.float32)
    inputs = [x.detach() for x in case.inputs]
    op = torch.ops.step_kernels.class_attention
    ours = op(*inputs, case.cu_seqlens, 0.3, False, True, True)[2]
    with sk.use_backend("reference"):
        plain = op(*inputs, case.cu_seqlens, 0.3, False, True, True)[2]
        truth = op(*(x.double() for x in inputs), case.cu_seqlens, 0.3, False, True, True)[2]
    assert ours.dtype == torch.float32 and not ours[1].any()
    error_rule(ours, plain, truth)


def test_inference_saves_no_log_sum_exp(cross_tiles, kernels):
    case = classes((17, 5), 3, 1, 16, torch.float32, spare=0)
    expected = case.run(scores=False)
    kernels.clear()
    out, _, lse = torch.ops.step_kernels.class_attention(*case.inputs, case.cu_seqlens, None, False, False, True)
    assert lse.shape == (0,)
    identical([out, *torch.autograd.grad(out, case.inputs, case.cotangents[0])], expected)
    assert kernels == FORWARD + FORWARD + BACKWARD  # its backward pass has to make up for it
