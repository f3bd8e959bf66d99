"""class_attention against one softmax per image, head and class, and against composed PyTorch under autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from floors import refused
from hypothesis import given
from hypothesis import strategies as st
from tensors import LOW_PRECISION, ROW_VIEWS, close, error_rule, gradients, poison, swapped
from torch import Tensor

import step_kernels as sk

LENGTHS = (0, 1, 2, 3, 17, 63, 65, 127, 197)
BATCHES = {
    "every_length": LENGTHS,
    "no_images": (),
    "all_empty": (0, 0),
    "single_token": (1,),
    "empty_between": (0, 5, 0, 0, 3, 0),
}


def offsets(lengths: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))


def metadata(lengths: tuple[int, ...]) -> tuple[Tensor, int]:
    return torch.tensor(offsets(lengths), dtype=torch.int32), max(lengths, default=0)


def brute_force(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, C, H, D] and mean scores [live, C] in fp64: one class of one head at a time."""
    batch, classes, heads, dim = q.shape
    factor = 1 / math.sqrt(dim) if scale is None else scale
    out, mean_scores = [torch.zeros(0, classes, heads, dim).double()], [torch.zeros(0, classes).double()]
    for image, (start, end) in enumerate(itertools.pairwise(offsets(lengths))):
        results, columns = [], []
        for c in range(classes):
            per_head = [k[start:end, h].double() @ q[image, c, h].double() * factor for h in range(heads)]
            columns.append(torch.stack(per_head).mean(0))
            attended = [scores.softmax(0) @ v[start:end, h].double() for h, scores in enumerate(per_head)]
            results.append(torch.stack(attended))
        if classes:
            out.append(torch.stack(results)[None])
            mean_scores.append(torch.stack(columns, 1))
    if not classes:
        return torch.zeros(batch, 0, heads, dim).double(), torch.zeros(sum(lengths), 0).double()
    return torch.cat(out), torch.cat(mean_scores)


def composed(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The docstring's PyTorch, in the inputs' dtype with softmax as PyTorch does it."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    out, mean_scores = [q[:0]], [k.new_zeros(0, q.shape[1])]
    for image, (start, end) in enumerate(itertools.pairwise(offsets(lengths))):
        scores = torch.einsum("chd,thd->htc", q[image], k[start:end]) * factor
        out.append(torch.einsum("htc,thd->chd", scores.softmax(1), v[start:end])[None])
        mean_scores.append(scores.mean(0))
    return torch.cat(out), torch.cat(mean_scores)


def make(
    lengths: tuple[int, ...],
    classes: int = 3,
    heads: int = 2,
    dim: int = 4,
    dtype: torch.dtype = torch.float64,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v with NaN in ``spare`` rows past the live ones."""
    live = sum(lengths)
    q = torch.randn(len(lengths), classes, heads, dim, dtype=torch.float64).to(dtype).requires_grad_()
    rows = [torch.randn(live + spare, heads, dim, dtype=torch.float64).to(dtype) for _ in range(2)]
    return q, *(poison(x, live).requires_grad_() for x in rows)


def both_gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], cotangents: list[Tensor]) -> list[Tensor]:
    """Gradients through the output and the scores at once."""
    found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("spare", (0, 7))
@pytest.mark.parametrize("name", BATCHES)
def test_forward_and_backward(name: str, spare: int) -> None:
    lengths = BATCHES[name]
    live = sum(lengths)
    inputs = make(lengths, spare=spare)
    cu_seqlens, longest = metadata(lengths)
    result = sk.class_attention(*inputs, cu_seqlens, longest, return_scores=True)
    truth = brute_force(*inputs, lengths)
    close(result[0], truth[0])
    close(result[1][:live], truth[1])
    assert not result[1][live:].any()
    assert torch.equal(sk.class_attention(*inputs, cu_seqlens, longest), result[0])
    cotangents = [torch.randn_like(result[0]), poison(torch.randn_like(result[1]), live)]
    found = both_gradients(result, inputs, cotangents)
    if not truth[0].requires_grad:
        return
    expected = both_gradients(truth, inputs, [cotangents[0], cotangents[1][:live]])
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, 1e-11)
    assert not found[1][live:].any() and not found[2][live:].any()


@pytest.mark.parametrize("used", ("out", "scores"))
def test_gradients_through_one_of_the_two(used: str) -> None:
    lengths = (5, 0, 3)
    inputs = make(lengths)
    which = 0 if used == "out" else 1
    result = sk.class_attention(*inputs, *metadata(lengths), return_scores=True)[which]
    truth = composed(*inputs, lengths)[which]
    cotangent = torch.randn_like(result)
    for ours, theirs in zip(gradients(result, inputs, cotangent), gradients(truth, inputs, cotangent), strict=True):
        close(ours, theirs)


@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([None, 0.0, 0.3, -2.0]),
    st.integers(0, 4),
)
def test_generated_batches(
    lengths: list[int], classes: int, heads: int, dim: int, scale: float | None, spare: int
) -> None:
    lengths = tuple(lengths)
    live = sum(lengths)
    inputs = make(lengths, classes, heads, dim, spare=spare)
    cu_seqlens, longest = metadata(lengths)
    out, scores = sk.class_attention(*inputs, cu_seqlens, longest + spare, scale=scale, return_scores=True)
    truth = brute_force(*inputs, lengths, scale)
    close(out, truth[0])
    close(scores[:live], truth[1])
    if not truth[0].requires_grad:
        return
    cotangents = [torch.randn_like(out), poison(torch.randn_like(scores), live)]
    expected = both_gradients(truth, inputs, [cotangents[0], cotangents[1][:live]])
    for ours, theirs in zip(both_gradients((out, scores), inputs, cotangents), expected, strict=True):
        close(ours, theirs, 1e-11)


@pytest.mark.parametrize("spare", (0, 2))
def test_queries_shared_by_the_batch(spare: int) -> None:
    """A parameter [C, H, D] as an expanded view: its gradient is the sum over images."""
    lengths = (4, 0, 7)
    _, k, v = make(lengths, spare=spare)
    queries = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    out = sk.class_attention(queries.expand(3, -1, -1, -1), k, v, *metadata(lengths))
    truth, _ = brute_force(queries.expand(3, -1, -1, -1), k, v, lengths)
    close(out, truth)
    cotangent = torch.randn_like(out)
    found, expected = (gradients(x, [queries], cotangent)[0] for x in (out, truth))
    close(found, expected)


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_one_argument_alone(which: int) -> None:
    inputs = [tensor.detach() for tensor in make((3, 5))]
    inputs[which].requires_grad_()
    cotangent = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    found = gradients(sk.class_attention(*inputs, *metadata((3, 5))), [inputs[which]], cotangent)
    close(found[0], gradients(brute_force(*inputs, (3, 5))[0], [inputs[which]], cotangent)[0])


@pytest.mark.parametrize("dim", (16, 64, 72, 80, 256))
@pytest.mark.parametrize("classes", (1, 19, 150))
def test_sizes(dim: int, classes: int) -> None:
    inputs = [tensor.detach() for tensor in make((5, 4), classes, dim=dim)]
    result = sk.class_attention(*inputs, *metadata((5, 4)), return_scores=True)
    for ours, theirs in zip(result, composed(*inputs, (5, 4)), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ("every_length", "single_token"))
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    lengths = BATCHES[name]
    inputs = make(lengths, dim=16, dtype=dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    result = sk.class_attention(*inputs, *metadata(lengths), return_scores=True)
    rival, truth = composed(*inputs, lengths), composed(*exact, lengths)
    cotangents = [torch.randn(x.shape).to(dtype) for x in truth]
    for ours, theirs, true in zip(
        (*result, *both_gradients(result, inputs, cotangents)),
        (*rival, *both_gradients(rival, inputs, cotangents)),
        (*truth, *both_gradients(truth, exact, [x.double() for x in cotangents])),
        strict=True,
    ):
        error_rule(ours, theirs, true)


def test_half_precision_sums_do_not_overflow() -> None:
    """q . k reaches 2.6e6 here, forty times what fp16 holds; scaled, the scores are 3.2e4 and fit."""
    q, k, v = (tensor.detach() for tensor in make((6,), dim=64, dtype=torch.float16))
    q, k = (q + 200).round(), (k + 200).round()  # sums of integers are exact in any order
    result = sk.class_attention(q, k, v, *metadata((6,)), scale=1 / 80, return_scores=True)
    truth = brute_force(q, k, v, (6,), 1 / 80)
    single = composed(*(x.float() for x in (q, k, v)), (6,), 1 / 80)
    for ours, peer, true in zip(result, single, truth, strict=True):
        assert ours.isfinite().all()
        error_rule(ours, peer.half(), true)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_mates_do_not_matter(dtype: torch.dtype) -> None:
    lengths = (17, 0, 65, 1, 33)
    q, k, v = (tensor.detach() for tensor in make(lengths, dim=16, dtype=dtype))
    together = sk.class_attention(q, k, v, *metadata(lengths))
    for image, (start, end) in enumerate(itertools.pairwise(offsets(lengths))):
        alone = q[image : image + 1], k[start:end].contiguous(), v[start:end].contiguous()
        assert torch.equal(sk.class_attention(*alone, *metadata((end - start,)))[0], together[image])


def test_nan_stays_where_it_is() -> None:
    lengths = (3, 4)
    q, k, v = (tensor.detach() for tensor in make(lengths, dtype=torch.float32))
    clean = sk.class_attention(q, k, v, *metadata(lengths), return_scores=True)
    q[0, 1, 0, 2] = math.nan  # one class of one head of one image
    out, scores = sk.class_attention(q, k, v, *metadata(lengths), return_scores=True)
    assert out[0, 1, 0].isnan().all() and scores[:3, 1].isnan().all()
    assert torch.equal(out[0, 1, 1], clean[0][0, 1, 1]) and torch.equal(out[1], clean[0][1])
    assert torch.equal(out[0, [0, 2]], clean[0][0, [0, 2]]) and torch.equal(scores[3:], clean[1][3:])
    k[1] = math.nan  # a token: its whole image
    out, scores = sk.class_attention(q, k, v, *metadata(lengths), return_scores=True)
    assert out[0].isnan().all() and torch.equal(out[1], clean[0][1])
    assert scores[1].isnan().all() and torch.equal(scores[[0, 2]][:, [0, 2]], clean[1][[0, 2]][:, [0, 2]])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    **ROW_VIEWS,
    "swapped": swapped,
    "shared": lambda tensor: tensor[:1].expand_as(tensor),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    strided = tuple(VIEWS[view](tensor.detach()).requires_grad_() for tensor in make((4, 5)))
    packed = tuple(x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided)
    cotangents = [VIEWS[view](torch.randn(2, 3, 2, 4).double()), VIEWS[view](torch.randn(9, 3).double())]
    results = [sk.class_attention(*x, *metadata((4, 5)), return_scores=True) for x in (strided, packed)]
    found = [both_gradients(r, x, cotangents) for r, x in zip(results, (strided, packed), strict=True)]
    for ours, theirs in zip((*results[0], *found[0]), (*results[1], *found[1]), strict=True):
        close(ours, theirs)


def test_an_overestimated_max_seqlen_changes_nothing() -> None:
    inputs = make((4, 6))
    cu_seqlens, longest = metadata((4, 6))
    calls = [sk.class_attention(*inputs, cu_seqlens, n) for n in (longest, 50 * longest)]
    assert torch.equal(*calls)


def test_undefined_tail_leaves_live_rows_alone() -> None:
    inputs = make((4, 5), spare=3)
    calls = [
        sk.class_attention(*inputs, *metadata((4, 5)), return_scores=True, tail=tail) for tail in ("zero", "undefined")
    ]
    assert torch.equal(calls[0][0], calls[1][0]) and torch.equal(calls[0][1][:9], calls[1][1][:9])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.zeros(2, 5, 8)}, ValueError, ["q", "[B, C, H, D]", "2, 5, 8"]),
        ({"q": torch.zeros(3, 3, 2, 8)}, ValueError, ["q", "[2, 3, 2, 8]", "[3, 3, 2, 8]"]),
        ({"q": torch.zeros(2, 3, 2, 8).int()}, TypeError, ["q", "int32"]),
        ({"q": torch.zeros(2, 3, 8, 2).mT}, ValueError, ["q", "contiguous last"]),
        ({"q": torch.zeros(2, 3, 2, 257)}, ValueError, ["q", "256", "257"]),
        ({"k": torch.zeros(5, 3, 8)}, ValueError, ["k", "[T, 2, 8]", "5, 3, 8"]),
        ({"k": torch.zeros(5, 2, 8).half()}, TypeError, ["k", "float32", "float16"]),
        ({"v": torch.zeros(6, 2, 8)}, ValueError, ["v", "5, 2, 8", "6, 2, 8"]),
        ({"v": torch.zeros(5, 2, 8, device="meta")}, ValueError, ["v", "meta", "cpu"]),
        ({"cu_seqlens": torch.tensor([0, 5, 5])}, TypeError, ["cu_seqlens", "int32", "int64"]),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, ["cu_seqlens"]),
        ({"cu_seqlens": [0, 5]}, TypeError, ["cu_seqlens", "list"]),
        ({"max_seqlen": -1}, ValueError, ["max_seqlen", "-1"]),
        ({"max_seqlen": 5.0}, TypeError, ["max_seqlen", "5.0"]),
        ({"max_seqlen": 2}, ValueError, ["max_seqlen", "at least 3", "got 2"]),
        ({"scale": "x"}, TypeError, ["scale", "x"]),
        ({"return_scores": 1}, TypeError, ["return_scores", "1"]),
        ({"tail": "ones"}, ValueError, ["tail", "zero", "ones"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {
        "q": torch.zeros(2, 3, 2, 8),
        "k": torch.zeros(5, 2, 8),
        "v": torch.zeros(5, 2, 8),
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
        "max_seqlen": 5,
        **change,
    }
    with refused(error, words):
        sk.class_attention(**arguments)
