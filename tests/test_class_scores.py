"""class_scores against one dot product per token and class, and against composed PyTorch under autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases.class_scores import Scores, scores_case, scores_within_the_rule
from floors import refused
from hypothesis import given
from hypothesis import strategies as st
from tensors import LOW_PRECISION, ROW_VIEWS, close, swapped
from torch import Tensor

import step_kernels as sk

BATCHES = {
    "every_length": (0, 1, 2, 3, 17, 63, 65),
    "no_images": (),
    "all_empty": (0, 0),
    "single_token": (1,),
    "empty_between": (0, 5, 0, 0, 3, 0),
}


def brute_force(case: Scores) -> list[Tensor]:
    """Scores and gradients of q and k, in fp64: one token and class at a time, by the definition of each."""
    q, k, grad = case.q.double(), case.k.double(), case.cotangent.double()
    scores, grad_q, grad_k = torch.zeros(grad.shape).double(), torch.zeros_like(q), torch.zeros(k.shape).double()
    for image, (start, stop) in enumerate(itertools.pairwise(itertools.accumulate(case.lengths, initial=0))):
        for token, c in itertools.product(range(start, stop), range(q.shape[1])):
            scores[token, c] = (q[image, c] * k[token]).sum() * case.scale
            grad_q[image, c] += grad[token, c] * k[token] * case.scale
            grad_k[token] += grad[token, c] * q[image, c] * case.scale
    return [scores, grad_q, grad_k]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, tolerance)


@pytest.mark.parametrize("spare", (0, 7))
@pytest.mark.parametrize("name", BATCHES)
def test_forward_and_backward(name: str, spare: int) -> None:
    case = scores_case(BATCHES[name], 3, 5, torch.float64, spare=spare, scale=0.7)
    assert_close(case.run(), brute_force(case))


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(0, 4),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.0, -2.0]),
    st.integers(0, 3),
)
def test_generated_batches(lengths: list[int], classes: int, dim: int, scale: float, spare: int) -> None:
    case = scores_case(lengths, classes, dim, torch.float64, spare=spare, scale=scale)
    assert_close(case.run(), brute_force(case))


def test_is_the_mean_of_heads_that_class_attention_returns() -> None:
    case = scores_case((5, 0, 12), 3, 24, torch.float64)
    q, k = case.q.unflatten(2, (3, 8)), case.k.unflatten(1, (3, 8))
    _, mean = sk.class_attention(q, k, k, case.cu_seqlens, 12, scale=1.0, return_scores=True)
    close(sk.class_scores(case.q, case.k, case.cu_seqlens, scale=1 / 3), mean)


@pytest.mark.parametrize("spare", (0, 2))
def test_vectors_shared_by_the_batch(spare: int) -> None:
    """A parameter [C, D] as an expanded view: its gradient is the sum over images."""
    case = scores_case((4, 0, 7), 3, 5, torch.float64, spare=spare)
    vectors = case.q[0].clone().requires_grad_()
    case.q = vectors.detach().expand_as(case.q)
    scores = sk.class_scores(vectors.expand_as(case.q), case.k, case.cu_seqlens)
    expected = brute_force(case)
    close(scores, expected[0])
    close(torch.autograd.grad(scores, vectors, case.cotangent)[0], expected[1].sum(0))


@pytest.mark.parametrize("which", range(2))
def test_gradient_of_one_argument_alone(which: int) -> None:
    case = scores_case((3, 5), 4, 6, torch.float64)
    inputs = [case.q, case.k]
    inputs[which] = inputs[which].clone().requires_grad_()
    scores = sk.class_scores(*inputs, case.cu_seqlens)
    close(torch.autograd.grad(scores, inputs[which], case.cotangent)[0], brute_force(case)[1 + which])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("dim", (1, 64, 1024))
def test_low_precision(dim: int, dtype: torch.dtype) -> None:
    case = scores_case((17, 0, 65), 19, dim, dtype, scale=1 / dim)
    scores_within_the_rule(case, case.run())


def test_half_precision_sums_do_not_overflow() -> None:
    """k . q reaches 2.6e6 here, forty times what fp16 holds; scaled, the scores are 3.2e4 and fit."""
    case = scores_case((6, 3), 3, 64, torch.float16, scale=1 / 80)
    case.q += 200
    case.k += 200
    scores = case.run()[0]
    assert scores.isfinite().all()
    close(scores[: case.live], brute_force(case)[0][: case.live], 1e-3)


VIEWS = {**ROW_VIEWS, "shared": lambda tensor: tensor[:1].expand_as(tensor)}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    case = scores_case((4, 5), 3, 6, torch.float64, spare=0)
    views = [VIEWS[view](x) for x in (case.q, case.k, case.cotangent)]
    packed = [x.clone(memory_format=torch.contiguous_format) for x in views]
    assert_close(Scores((4, 5), *views).run(), Scores((4, 5), *packed).run())
    assert_close(Scores((4, 5), swapped(case.q), *views[1:]).run(), Scores((4, 5), case.q, *packed[1:]).run())


def test_undefined_tail_leaves_live_rows_alone() -> None:
    case = scores_case((4, 5), 3, 6, torch.float32)
    for ours, theirs, rows in zip(case.run(), case.run(tail="undefined"), (9, 2, 9), strict=True):
        assert torch.equal(ours[:rows], theirs[:rows])


def test_nan_stays_where_it_is() -> None:
    case = scores_case((3, 4), 3, 6, torch.float32)
    clean = sk.class_scores(case.q, case.k, case.cu_seqlens)
    case.q[0, 1, 2], case.k[5, 0] = torch.nan, torch.nan
    found = sk.class_scores(case.q, case.k, case.cu_seqlens)
    poisoned = torch.zeros_like(found, dtype=torch.bool)
    poisoned[:3, 1] = poisoned[5] = True
    assert torch.equal(found.isnan(), poisoned) and torch.equal(found[~poisoned], clean[~poisoned])


def test_reads_no_value_on_the_host() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k = torch.zeros(2, 3, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
        scores = sk.class_scores(q, k, torch.zeros(3, dtype=torch.int32))
        scores.sum().backward()
        assert scores.shape == (5, 3) and q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.zeros(2, 3, 2, 8)}, ValueError, ["q", "[B, C, D]", "2, 3, 2, 8"]),
        ({"q": torch.zeros(3, 3, 8)}, ValueError, ["q", "[2, 3, 8]", "[3, 3, 8]"]),
        ({"q": torch.zeros(2, 3, 8).int()}, TypeError, ["q", "int32"]),
        ({"q": torch.zeros(2, 8, 3).mT}, ValueError, ["q", "contiguous last"]),
        ({"q": torch.zeros(2, 3, 0), "k": torch.zeros(5, 0)}, ValueError, ["q", "at least 1", "0"]),
        ({"k": torch.zeros(5, 7)}, ValueError, ["k", "[T, 8]", "5, 7"]),
        ({"k": torch.zeros(5, 8).half()}, TypeError, ["k", "float32", "float16"]),
        ({"k": torch.zeros(8, 5).T}, ValueError, ["k", "contiguous last"]),
        ({"k": torch.zeros(5, 8, device="meta")}, ValueError, ["k", "meta", "cpu"]),
        ({"cu_seqlens": torch.tensor([0, 5, 5])}, TypeError, ["cu_seqlens", "int32", "int64"]),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, ["cu_seqlens", "at least 1"]),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, ["cu_seqlens", "meta", "cpu"]),
        ({"scale": None}, TypeError, ["scale", "None"]),
        ({"tail": "ones"}, ValueError, ["tail", "zero", "ones"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {
        "q": torch.zeros(2, 3, 8),
        "k": torch.zeros(5, 8),
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
        **change,
    }
    with refused(error, words):
        sk.class_scores(**arguments)
