"""masked_attention against one softmax per kept query."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from floors import refused
from hypothesis import given
from hypothesis import strategies as st
from tensors import LOW_PRECISION, agree, close, error_rule, gradients, offset, rule_with_gradients, wide_rows
from torch import Tensor

import step_kernels as sk

LENGTHS = (0, 1, 2, 3, 17, 63, 65, 127, 197)
KEYS = ("kept", "all")


def brute_force(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, keys: str = "kept", scale: float | None = None
) -> Tensor:
    """[B, H, L, D] in fp64: one query at a time, over lists of rows."""
    batch, heads, length, dim = q.shape
    factor = 1 / math.sqrt(dim) if scale is None else scale
    zero = torch.zeros(dim, dtype=torch.float64)
    images = []
    for b in range(batch):
        kept = [row for row in range(length) if keep[b, row]]
        others = kept if keys == "kept" else list(range(length))
        per_head = []
        for h in range(heads):
            rows = [zero] * length
            for query in kept:
                weights = torch.softmax(k[b, h, others].double() @ q[b, h, query].double() * factor, 0)
                rows[query] = weights @ v[b, h, others].double()
            per_head.append(torch.stack(rows) if rows else torch.zeros(0, dim, dtype=torch.float64))
        images.append(torch.stack(per_head) if per_head else torch.zeros(0, length, dim, dtype=torch.float64))
    return torch.stack(images) if images else torch.zeros(0, heads, length, dim, dtype=torch.float64)


def plain_pytorch(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, keys: str = "kept", scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention with a key mask, other rows zeroed; needs a kept token in every image."""
    mask = keep[:, None, None, :] if keys == "kept" else None
    return torch.where(keep[:, None, :, None], F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), 0)


def make_qkv(
    batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.randn(batch, heads, length, dim, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)
    )


def a_mask(batch: int, length: int, share: float = 0.6) -> Tensor:
    """Random, with one whole image and, where there are three, an empty one."""
    keep = torch.rand(batch, length) < share
    keep[:1] = True
    keep[2:3] = False
    return keep


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_and_backward(length: int, keys: str) -> None:
    batch = 4 if length < 100 else 2
    qkv = make_qkv(batch, 2, length, 4)
    keep = a_mask(batch, length)
    result = sk.masked_attention(*qkv, keep, keys=keys)
    truth = brute_force(*qkv, keep, keys)
    close(result, truth)
    dropped = (~keep)[:, None, :, None].expand_as(result)
    assert not result[dropped].any()
    cotangent = torch.randn_like(result)
    found = gradients(result, qkv, cotangent)
    for ours, theirs in zip(found, gradients(truth, qkv, cotangent), strict=True):
        close(ours, theirs, 1e-11)
    for ours in found[: 3 if keys == "kept" else 1]:
        assert not ours[dropped].any()


@given(
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([None, 0.0, 0.3, -2.0]),
    st.sampled_from(KEYS),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_generated_batches(
    batch: int, heads: int, length: int, dim: int, scale: float | None, keys: str, share: float
) -> None:
    qkv = make_qkv(batch, heads, length, dim)
    keep = torch.rand(batch, length) < share
    result = sk.masked_attention(*qkv, keep, keys=keys, scale=scale)
    truth = brute_force(*qkv, keep, keys, scale)
    agree(result, truth, qkv, of_gradients=1e-11)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dim", (16, 64, 72, 80, 256))
def test_equals_sdpa_with_the_mask(dim: int, keys: str) -> None:
    qkv = make_qkv(2, 3, 17, dim)
    keep = a_mask(2, 17)
    result, truth = sk.masked_attention(*qkv, keep, keys=keys), plain_pytorch(*qkv, keep, keys)
    agree(result, truth, qkv, of_gradients=1e-11)


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_one_argument_alone(which: int) -> None:
    qkv = [tensor.detach() for tensor in make_qkv(2, 2, 6, 4)]
    qkv[which].requires_grad_()
    keep = a_mask(2, 6)
    cotangent = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    found = gradients(sk.masked_attention(*qkv, keep), [qkv[which]], cotangent)
    close(found[0], gradients(brute_force(*qkv, keep), [qkv[which]], cotangent)[0])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("keys", KEYS)
def test_low_precision(keys: str, dtype: torch.dtype) -> None:
    qkv = make_qkv(2, 3, 65, 16, dtype)
    keep = a_mask(2, 65)
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    result = sk.masked_attention(*qkv, keep, keys=keys)
    rival, truth = plain_pytorch(*qkv, keep, keys), brute_force(*exact, keep, keys)
    rule_with_gradients(result, rival, truth, qkv, exact)


def test_half_precision_scores_do_not_overflow() -> None:
    """q . k reaches 2.6e6 here, forty times what fp16 holds."""
    q, k, v = (tensor.detach() for tensor in make_qkv(1, 2, 6, 64, torch.float16))
    q, k = (q + 200).round(), (k + 200).round()  # sums of integers are exact in any order
    keep = torch.tensor([[True, False, True, True, True, False]])
    result = sk.masked_attention(q, k, v, keep)
    assert result.isfinite().all()
    error_rule(result, plain_pytorch(q, k, v, keep), brute_force(q, k, v, keep))


@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_rows_that_are_not_kept_are_never_read(poison: float) -> None:
    q, k, v = (tensor.detach() for tensor in make_qkv(3, 2, 17, 8, torch.float32))
    keep = a_mask(3, 17)
    cotangent = torch.randn_like(q)
    dropped = (~keep)[:, None, :, None].expand_as(q)

    def run(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, **named: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = sk.masked_attention(*leaves, keep, **named)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    spoiled = [x.masked_fill(dropped, poison) for x in (q, k, v, cotangent)]
    for ours, clean in zip(run(*spoiled), run(q, k, v, cotangent), strict=True):
        assert torch.equal(ours, clean)
    with_all = run(spoiled[0], k, v, spoiled[3], keys="all")
    for ours, clean in zip(with_all, run(q, k, v, cotangent, keys="all"), strict=True):
        assert torch.equal(ours, clean)


def test_nan_in_a_kept_row_stays_in_its_image_and_head() -> None:
    q, k, v = (tensor.detach() for tensor in make_qkv(2, 2, 7, 8, torch.float32))
    keep = a_mask(2, 7)
    clean = sk.masked_attention(q, k, v, keep)
    q[0, 1, 3, 2] = math.nan  # image 0 is whole
    result = sk.masked_attention(q, k, v, keep)
    assert result[0, 1, 3].isnan().all()
    result[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(result, clean)
    k[0, 0, 0] = math.nan
    result = sk.masked_attention(q, k, v, keep)
    assert result[0, 0].isnan().all() and torch.equal(result[1], clean[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("keys", KEYS)
def test_batch_mates_do_not_matter(dtype: torch.dtype, keys: str) -> None:
    qkv = [tensor.detach() for tensor in make_qkv(4, 2, 33, 16, dtype)]
    keep = a_mask(4, 33)
    together = sk.masked_attention(*qkv, keep, keys=keys)
    for b in range(4):
        alone = sk.masked_attention(*(x[b : b + 1] for x in qkv), keep[b : b + 1], keys=keys)
        assert torch.equal(alone[0], together[b])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": offset,
    "wide_rows": wide_rows,
    "rows_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "shared_by_heads": lambda x: x[:, :1].expand_as(x),
    "one_row": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    keep = a_mask(2, 9)
    strided = [VIEWS[view](tensor.detach()).requires_grad_() for tensor in make_qkv(2, 2, 9, 8)]
    packed = [tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in strided]
    cotangent = VIEWS[view](torch.randn(2, 2, 9, 8, dtype=torch.float64))
    results = [sk.masked_attention(*qkv, keep) for qkv in (strided, packed)]
    close(results[0], results[1])
    for ours, theirs in zip(
        gradients(results[0], strided, cotangent), gradients(results[1], packed, cotangent.contiguous()), strict=True
    ):
        close(ours, theirs)


def test_views_of_one_projection() -> None:
    """As in a plain ViT block: the output is ready for the projection, and the gradient arrives in the one qkv tensor."""
    qkv = torch.randn(2, 9, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    keep = a_mask(2, 9)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    result = sk.masked_attention(q, k, v, keep)
    assert result.transpose(1, 2).is_contiguous()
    cotangent = torch.randn_like(result)
    found, truth = (gradients(x, [qkv], cotangent)[0] for x in (result, brute_force(q, k, v, keep)))
    close(found, truth)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.zeros(2, 5, 8)}, ValueError, ["q", "[B, H, L, D]", "2, 5, 8"]),
        ({"q": torch.zeros(2, 2, 5, 8).int()}, TypeError, ["q", "int32"]),
        ({"q": [1]}, TypeError, ["q", "list"]),
        ({"k": torch.zeros(2, 2, 6, 8)}, ValueError, ["k", "2, 2, 5, 8", "2, 2, 6, 8"]),
        ({"v": torch.zeros(2, 2, 5, 8).half()}, TypeError, ["v", "float32", "float16"]),
        ({"k": torch.zeros(2, 2, 8, 5).mT}, ValueError, ["k", "contiguous last"]),
        ({name: torch.zeros(2, 2, 5, 257) for name in "qkv"}, ValueError, ["q", "256", "257"]),
        ({name: torch.zeros(2, 2, 5, 0) for name in "qkv"}, ValueError, ["q", "256", "0"]),
        ({"keep": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, ["keep", "2, 5", "2, 4"]),
        ({"keep": torch.zeros(2, 5)}, TypeError, ["keep", "bool", "float32"]),
        ({"keep": torch.zeros(2, 5, dtype=torch.bool, device="meta")}, ValueError, ["keep", "meta", "cpu"]),
        ({"keep": None}, TypeError, ["keep", "None"]),
        ({"keys": "some"}, ValueError, ["keys", "'kept'", "'all'", "some"]),
        ({"scale": "x"}, TypeError, ["scale", "x"]),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: list[str]) -> None:
    arguments = {name: torch.zeros(2, 2, 5, 8) for name in "qkv"}
    arguments |= {"keep": torch.ones(2, 5, dtype=torch.bool), **change}
    with refused(error, words):
        sk.masked_attention(**arguments)
