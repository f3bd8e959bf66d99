"""ragged_attention against one softmax per image, head and query."""

from __future__ import annotations

import itertools

import brute_force
import pytest
import torch
import torch.nn.functional as F
from floors import refused
from hypothesis import given
from hypothesis import strategies as st
from tensors import LOW_PRECISION, ROW_VIEWS, agree, close, error_rule, gradients, poison, rule_with_gradients, swapped
from torch import Tensor

import step_kernels as sk

LENGTHS = (0, 1, 2, 3, 17, 63, 65, 127, 197, 577)
BATCHES = {
    "every_length": LENGTHS,
    "no_images": (),
    "all_empty": (0, 0, 0),
    "single_token": (1,),
    "empty_between": (0, 5, 0, 0, 3, 0),
    "ones": (1, 1, 1, 1),
    "alike": (17, 17, 0, 17, 4, 4),
}


def offsets(lengths: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))


def metadata(lengths: tuple[int, ...]) -> tuple[Tensor, int]:
    return torch.tensor(offsets(lengths), dtype=torch.int32), max(lengths, default=1)


def make_qkv(
    rows: int, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64, spare: int = 0
) -> tuple[Tensor, ...]:
    return tuple(
        poison(torch.randn(rows + spare, heads, dim, dtype=torch.float64).to(dtype), rows).requires_grad_()
        for _ in range(3)
    )


def plain_pytorch(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """scaled_dot_product_attention, image by image."""
    results = [q[:0]]
    for start, end in itertools.pairwise(offsets(lengths)):
        one = [tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v)]
        if end > start:
            results.append(F.scaled_dot_product_attention(*one)[0].transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("spare", (0, 7))
@pytest.mark.parametrize("name", BATCHES)
def test_forward_and_backward(name: str, spare: int) -> None:
    lengths = BATCHES[name]
    live = sum(lengths)
    qkv = make_qkv(live, spare=spare)
    cu_seqlens, longest = metadata(lengths)
    result = sk.ragged_attention(*qkv, cu_seqlens, longest)
    truth = brute_force.attention(*qkv, offsets(lengths))
    agree(result, truth, qkv, of_gradients=1e-11)


@given(
    st.lists(st.integers(0, 9), max_size=5),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([None, 0.0, 0.3, 2.0]),
    st.booleans(),
    st.integers(0, 4),
)
def test_generated_batches(
    lengths: list[int], heads: int, dim: int, scale: float | None, biased: bool, spare: int
) -> None:
    live = sum(lengths)
    qkv = make_qkv(live, heads, dim, spare=spare)
    cu_seqlens, longest = metadata(tuple(lengths))
    bias = poison(torch.randn(live + spare, dtype=torch.float64), live) if biased else None
    result = sk.ragged_attention(*qkv, cu_seqlens, longest + spare, scale=scale, key_bias=bias)
    truth = brute_force.attention(*qkv, offsets(tuple(lengths)), scale, bias)
    agree(result, truth, qkv, of_gradients=1e-11)


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_one_argument_alone(which: int) -> None:
    qkv = [tensor.detach() for tensor in make_qkv(8)]
    qkv[which].requires_grad_()
    cu_seqlens, longest = metadata((3, 5))
    cotangent = torch.randn(8, 2, 8, dtype=torch.float64)
    found = gradients(sk.ragged_attention(*qkv, cu_seqlens, longest), [qkv[which]], cotangent)
    close(found[0], gradients(brute_force.attention(*qkv, [0, 3, 8]), [qkv[which]], cotangent)[0])


def test_key_bias_of_log_sizes_is_proportional_attention() -> None:
    """Proportional attention: a block counts as its cells, a prefix token as one, not as none, whose logarithm would hide it."""
    sides = torch.tensor([[[2, 2, 1, 1], [2, 2, 1, 1]], [[1, 1, 2, 2], [1, 1, 2, 2]]])
    layout = sk.SupertokenLayout.from_sides(sides, num_prefix=1)  # untrimmed: 18 rows, 12 of them live
    bias = layout.log_sizes()
    assert (bias.shape, bias.dtype, bias.device) == ((18,), torch.float32, layout.device)
    copies = torch.tensor([1, 4, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1])
    torch.testing.assert_close(bias, torch.nn.functional.pad(copies.log(), (0, 6)))
    q, k, v = (tensor.detach() for tensor in make_qkv(12, spare=6))
    repeated = [tensor[:12].repeat_interleave(copies, 0) for tensor in (k, v)]
    expected = brute_force.attention(q[:12].repeat_interleave(copies, 0), *repeated, [0, 9, 18])
    close(sk.ragged_attention(q, k, v, layout, key_bias=bias)[:12], expected[copies.cumsum(0) - 1], tolerance=1e-6)


def test_a_layout_stands_for_cu_seqlens_and_max_seqlen() -> None:
    layout = sk.SupertokenLayout.uniform(2, (2, 2), num_prefix=1)
    q, k, v = make_qkv(10)
    by_hand = layout.cu_seqlens, layout.max_seqlen
    assert torch.equal(sk.attention_schedule(layout), sk.attention_schedule(layout.cu_seqlens, layout.capacity))
    assert torch.equal(sk.ragged_attention(q, k, v, layout), sk.ragged_attention(q, k, v, *by_hand))
    queries = torch.randn(2, 3, *q.shape[1:], dtype=q.dtype)
    assert torch.equal(sk.class_attention(queries, k, v, layout), sk.class_attention(queries, k, v, *by_hand))
    vectors = queries[:, :, 0], k[:, 0].contiguous()
    assert torch.equal(sk.class_scores(*vectors, layout), sk.class_scores(*vectors, layout.cu_seqlens))
    compiled = torch.compile(lambda layout: sk.ragged_attention(q, k, v, layout), backend="eager", fullgraph=True)
    assert torch.equal(compiled(layout), sk.ragged_attention(q, k, v, layout))


def test_what_stands_for_a_layout_is_named() -> None:
    layout = sk.SupertokenLayout.uniform(2, (2, 2), num_prefix=1)
    q, k, v = make_qkv(10)
    with refused(TypeError, ["max_seqlen", "expected an int", "None"]):
        sk.ragged_attention(q, k, v, layout.cu_seqlens)
    with refused(TypeError, ["max_seqlen", "beside a layout", "5"]):
        sk.ragged_attention(q, k, v, layout, 5)
    with refused(TypeError, ["num_rows", "beside a layout", "10"]):
        sk.attention_schedule(layout, 10)
    with refused(ValueError, ["q", "10 rows", "capacity", "9"]):
        sk.ragged_attention(q[:9], k[:9], v[:9], layout)
    with refused(TypeError, ["cu_seqlens", "SupertokenLayout", "[B + 1]", "list"]):
        sk.ragged_attention(q, k, v, [0, 5, 10], 5)


def test_a_key_biased_to_minus_infinity_is_not_there() -> None:
    q, k, v = (tensor.detach() for tensor in make_qkv(5))
    bias = torch.tensor([0, 0, -torch.inf, 0, 0], dtype=torch.float64)
    result = sk.ragged_attention(q, k, v, *metadata((5,)), key_bias=bias)
    kept = [0, 1, 3, 4]
    close(result[kept], brute_force.attention(q[kept], k[kept], v[kept], [0, 4]))


@pytest.mark.parametrize("dim", (32, 64, 72, 80, 96, 128, 256))
def test_head_sizes(dim: int) -> None:
    qkv = make_qkv(9, dim=dim)
    close(sk.ragged_attention(*qkv, *metadata((5, 4))), brute_force.attention(*qkv, [0, 5, 9]))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ("every_length", "empty_between", "single_token"))
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    lengths = BATCHES[name]
    qkv = make_qkv(sum(lengths), dim=16, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    result = sk.ragged_attention(*qkv, *metadata(lengths))
    rival, truth = plain_pytorch(*qkv, lengths), brute_force.attention(*exact, offsets(lengths))
    rule_with_gradients(result, rival, truth, qkv, exact)


@pytest.mark.parametrize("bias_dtype", (*LOW_PRECISION, torch.float64))
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_key_bias(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    """The bias may have a dtype of its own; log(side^2) reaches 8.3, where bf16 is off by 0.03."""
    lengths = (17, 0, 5)
    qkv = make_qkv(22, dim=16, dtype=dtype)
    bias = torch.randint(0, 7, (22,)).double().exp2().square().log().to(bias_dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    result = sk.ragged_attention(*qkv, *metadata(lengths), key_bias=bias)
    truth = brute_force.attention(*exact, offsets(lengths), key_bias=bias)
    images = []
    for start, end in ((0, 17), (17, 22)):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in qkv)
        images.append(((q @ k.mT / 4 + bias[start:end].to(dtype)).softmax(-1) @ v).transpose(0, 1))
    rule_with_gradients(result, torch.cat(images), truth, qkv, exact)


def test_half_precision_scores_do_not_overflow() -> None:
    """q . k reaches 2.6e6 here, forty times what fp16 holds."""
    q, k, v = (tensor.detach() for tensor in make_qkv(6, dim=64, dtype=torch.float16))
    q, k = (q + 200).round(), (k + 200).round()  # sums of integers are exact in any order
    result = sk.ragged_attention(q, k, v, *metadata((6,)))
    assert result.isfinite().all()
    error_rule(result, plain_pytorch(q, k, v, (6,)), brute_force.attention(q, k, v, [0, 6]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_batch_mates_do_not_matter(dtype: torch.dtype) -> None:
    lengths = (17, 0, 65, 1, 33)
    qkv = [tensor.detach() for tensor in make_qkv(sum(lengths), dim=16, dtype=dtype)]
    together = sk.ragged_attention(*qkv, *metadata(lengths))
    for start, end in itertools.pairwise(offsets(lengths)):
        alone = [tensor[start:end].contiguous() for tensor in qkv]
        assert torch.equal(sk.ragged_attention(*alone, *metadata((end - start,))), together[start:end])


def test_nan_stays_where_it_is() -> None:
    lengths = (3, 4)
    q, k, v = (tensor.detach() for tensor in make_qkv(7))
    clean = sk.ragged_attention(q, k, v, *metadata(lengths))
    q[1, 0, 2] = float("nan")  # one query of one head
    result = sk.ragged_attention(q, k, v, *metadata(lengths))
    assert result[1, 0].isnan().all()
    assert torch.equal(result[[0, 2, 3, 4, 5, 6]], clean[[0, 2, 3, 4, 5, 6]])
    assert torch.equal(result[1, 1], clean[1, 1])
    q[1, 0, 2] = float("inf")
    assert sk.ragged_attention(q, k, v, *metadata(lengths))[1, 0].isnan().all()
    k[2] = float("nan")  # a key: its whole image
    result = sk.ragged_attention(q, k, v, *metadata(lengths))
    assert result[:3].isnan().all() and torch.equal(result[3:], clean[3:])


def test_an_overestimated_max_seqlen_changes_nothing() -> None:
    qkv = make_qkv(10)
    cu_seqlens, longest = metadata((4, 6))
    assert torch.equal(
        sk.ragged_attention(*qkv, cu_seqlens, longest), sk.ragged_attention(*qkv, cu_seqlens, 50 * longest)
    )


VIEWS = {
    **ROW_VIEWS,
    "heads_first": swapped,
    "shared_by_heads": lambda tensor: tensor[:, :1].expand_as(tensor),
    "one_row": lambda tensor: tensor[:1].expand_as(tensor),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    strided = [VIEWS[view](tensor.detach()).requires_grad_() for tensor in make_qkv(9)]
    packed = [tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in strided]
    cotangent = VIEWS[view](torch.randn(9, 2, 8, dtype=torch.float64))
    results = [sk.ragged_attention(*qkv, *metadata((4, 5))) for qkv in (strided, packed)]
    close(results[0], results[1])
    for ours, theirs in zip(
        gradients(results[0], strided, cotangent), gradients(results[1], packed, cotangent.contiguous()), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("arrangement", ("three_first", "three_inside"))
def test_views_of_one_projection(arrangement: str) -> None:
    """q, k and v as slices of a qkv matmul's output; the gradient arrives in that one tensor."""
    shape = (9, 3, 2, 8) if arrangement == "three_first" else (9, 2, 3, 8)
    qkv = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dim = 1 if arrangement == "three_first" else 2
    cotangent = torch.randn(9, 2, 8, dtype=torch.float64)
    found, truth = (
        gradients(call(*qkv.unbind(dim)), [qkv], cotangent)[0]
        for call in (
            lambda q, k, v: sk.ragged_attention(q, k, v, *metadata((4, 5))),
            lambda q, k, v: brute_force.attention(q, k, v, [0, 4, 9]),
        )
    )
    close(found, truth)


@pytest.mark.parametrize("spare", (0, 1, 300))
@pytest.mark.parametrize("lengths", ((), (0, 0), (1,), (128, 0, 129), (5, 400, 5, 400, 1), (3,) * 7))
def test_schedule(lengths: tuple[int, ...], spare: int) -> None:
    """Every tile once, those of longer images first; the unused entries cover the tail, each row at most once."""
    cu_seqlens, _ = metadata(lengths)
    live = sum(lengths)
    schedule = sk.attention_schedule(cu_seqlens, live + spare).tolist()
    starts = offsets(lengths)
    tiles = [
        [first, starts[image], starts[image + 1], image]
        for image in sorted(range(len(lengths)), key=lambda image: (-lengths[image], image))
        for first in range(starts[image], starts[image + 1], 128)
    ]
    unused = [[min(live + 128 * i, live + spare), 0, 0, -1] for i in range(len(schedule) - len(tiles))]
    assert schedule == tiles + unused
    assert len(unused) * 128 >= spare


def test_a_schedule_changes_no_result() -> None:
    qkv = make_qkv(9, spare=4)
    cu_seqlens, longest = metadata((4, 5))
    schedule = sk.attention_schedule(cu_seqlens, 13)
    call = [sk.ragged_attention(*qkv, cu_seqlens, longest, schedule=given) for given in (None, schedule)]
    assert torch.equal(*call)


def test_a_schedule_of_other_lengths_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With STEP_KERNELS_CHECK=1: it takes a sync."""
    monkeypatch.setattr(sk.checks, "values", lambda: True)
    qkv = make_qkv(9)
    schedule = sk.attention_schedule(metadata((3, 6))[0], 9)
    sk.ragged_attention(*qkv, *metadata((3, 6)), schedule=schedule)
    with pytest.raises(ValueError, match="schedule: expected"):
        sk.ragged_attention(*qkv, *metadata((4, 5)), schedule=schedule)


def test_log_sum_exp() -> None:
    """Saved for the backward pass only: natural log, zero past the live count, no gradient."""
    q, k, v = make_qkv(9, spare=4)
    bias = torch.randn(13, dtype=torch.float64)
    arguments = q, k, v, metadata((4, 5))[0], 0.3, bias, None
    out, lse = torch.ops.step_kernels.ragged_attention(*arguments, True, True)
    assert lse.shape == (2, 13) and not lse.requires_grad and not lse[:, 9:].any()
    for start, end in ((0, 4), (4, 9)):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * 0.3 + bias[start:end]
        close(lse[:, start:end], scores.logsumexp(-1))
    without, empty = torch.ops.step_kernels.ragged_attention(*arguments, False, True)
    assert torch.equal(without, out) and empty.shape == (0,)


def test_undefined_tail_leaves_live_rows_alone() -> None:
    qkv = make_qkv(9, spare=4)
    call = [sk.ragged_attention(*qkv, *metadata((4, 5)), tail=tail)[:9] for tail in ("zero", "undefined")]
    assert torch.equal(*call)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": "no tensor"}, TypeError, ["q", "no tensor"]),
        ({"q": torch.zeros(5, 16)}, ValueError, ["q", "5, 16"]),
        ({"q": torch.zeros(5, 2, 8, dtype=torch.int64)}, TypeError, ["q", "int64"]),
        ({"k": torch.zeros(4, 2, 8)}, ValueError, ["k", "5", "4, 2, 8"]),
        ({"k": torch.zeros(5, 1, 8)}, ValueError, ["k", "5, 1, 8"]),
        ({"v": torch.zeros(5, 2, 9)}, ValueError, ["v", "5, 2, 9"]),
        ({"v": torch.zeros(5, 2, 8, dtype=torch.float16)}, TypeError, ["v", "float32", "float16"]),
        ({"k": torch.zeros(5, 2, 16)[..., ::2]}, ValueError, ["k", "contiguous"]),
        (dict.fromkeys("qkv", torch.zeros(5, 2, 257)), ValueError, ["256", "257"]),
        ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, ["cu_seqlens", "int32", "int64"]),
        ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, ["cu_seqlens", "1, 2"]),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, ["cu_seqlens"]),
        ({"cu_seqlens": [0, 5]}, TypeError, ["cu_seqlens", "list"]),
        ({"max_seqlen": -1}, ValueError, ["max_seqlen", "-1"]),
        ({"max_seqlen": 5.0}, TypeError, ["max_seqlen", "5.0"]),
        ({"max_seqlen": 4}, ValueError, ["max_seqlen", "at least 5", "got 4"]),
        ({"scale": "x"}, TypeError, ["scale", "x"]),
        ({"key_bias": torch.zeros(4)}, ValueError, ["key_bias", "5", "4"]),
        ({"key_bias": torch.zeros(5, requires_grad=True)}, ValueError, ["key_bias", "gradient"]),
        ({"schedule": "x"}, TypeError, ["schedule", "x"]),
        ({"schedule": torch.zeros(2, 4)}, TypeError, ["schedule", "int32", "float32"]),
        ({"schedule": torch.zeros(3, 4, dtype=torch.int32)}, ValueError, ["schedule", "2, 4", "3, 4"]),
        ({"schedule": torch.zeros(4, 2, dtype=torch.int32).T}, ValueError, ["schedule", "contiguous"]),
        ({"schedule": torch.zeros(2, 4, dtype=torch.int32, device="meta")}, ValueError, ["schedule", "meta", "cpu"]),
        ({"tail": "ones"}, ValueError, ["tail", "zero", "ones"]),
        ({"q": torch.zeros(5, 2, 8, device="meta")}, ValueError, ["meta", "cpu"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {
        **{name: torch.zeros(5, 2, 8) for name in "qkv"},
        "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        "max_seqlen": 5,
        **change,
    }
    with refused(error, words):
        sk.ragged_attention(**arguments)


@pytest.mark.parametrize(
    "cu_seqlens, num_rows, error, words",
    [
        (torch.tensor([0, 5]), 5, TypeError, ["cu_seqlens", "int32", "int64"]),
        (torch.zeros(0, dtype=torch.int32), 5, ValueError, ["cu_seqlens", "at least 1"]),
        ([0, 5], 5, TypeError, ["cu_seqlens", "list"]),
        (torch.tensor([0, 5], dtype=torch.int32), -1, ValueError, ["num_rows", "-1"]),
        (torch.tensor([0, 5], dtype=torch.int32), 5.0, TypeError, ["num_rows", "5.0"]),
    ],
)
def test_bad_input_of_a_schedule_is_named(cu_seqlens, num_rows, error: type[Exception], words: list[str]) -> None:
    with refused(error, words):
        sk.attention_schedule(cu_seqlens, num_rows)
