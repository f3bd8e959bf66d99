"""The formulas that PyTorch's FLOP counter has of the ops, against its own formulas of the plain computation, image by image."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import step_kernels as sk
import step_kernels.flops
from step_kernels import SupertokenLayout

LENGTHS, SPARE = (5, 9, 2), 3  # tokens of each image, and rows past the last one
TOKENS, CLASSES, HEADS, HEAD_DIM = sum(LENGTHS), 4, 2, 8
DIM = HEADS * HEAD_DIM
ENDS = (0, *itertools.accumulate(LENGTHS))
CU_SEQLENS = torch.tensor(ENDS, dtype=torch.int32)
LAYOUT = SupertokenLayout(
    CU_SEQLENS,
    torch.cat(
        [torch.tensor([[b, 0, i, 1] for b, n in enumerate(LENGTHS) for i in range(n)]), torch.zeros(SPARE, 4)]
    ).int(),
    grid=(1, 9),
)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def rows(*shape: int) -> Tensor:
    return leaf(TOKENS + SPARE, *shape)


def attention_flops(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    """Forward and backward of PyTorch's attention between so many queries and keys."""
    shapes = [((1, HEADS, queries, HEAD_DIM), (1, HEADS, keys, HEAD_DIM)) for queries, keys in pairs]
    forward = sum(sdpa_flop_count(q, k, k) for q, k in shapes)
    return forward, sum(sdpa_backward_flop_count(q, q, k, k) for q, k in shapes)


KEEP = torch.tensor([[True] * 3 + [False] * 4, [True] * 6 + [False]])
LINEAR = 2 * TOKENS * DIM * CLASSES
EMBED = 2 * TOKENS * DIM * 3 * 2 * 2
SCORES = 2 * TOKENS * CLASSES * DIM
QUERIES = lambda: leaf(len(LENGTHS), CLASSES, HEADS, HEAD_DIM)  # noqa: E731
IMAGES = lambda: leaf(len(LENGTHS), 3, 2, 18)  # noqa: E731
TO_IMAGES = attention_flops([(CLASSES, length) for length in LENGTHS])
Case = tuple[Callable[[], Any], int, int]
CASES: dict[str, Case] = {  # the call, and FLOPs of its forward and backward
    "linear": (lambda: sk.ragged_linear(rows(DIM), leaf(CLASSES, DIM), layout=LAYOUT), LINEAR, 2 * LINEAR),
    "linear, every row live": (
        lambda: sk.ragged_linear(rows(DIM)[:TOKENS], leaf(CLASSES, DIM)), LINEAR, 2 * LINEAR,
    ),
    "linear, an activation recomputed": (
        lambda: sk.ragged_linear(rows(DIM), leaf(CLASSES, DIM), layout=LAYOUT, activation="gelu"), LINEAR, 3 * LINEAR,
    ),
    "linear, gradient of the weight alone": (
        lambda: sk.ragged_linear(rows(DIM).detach(), leaf(CLASSES, DIM), layout=LAYOUT), LINEAR, LINEAR,
    ),
    "embedding": (lambda: sk.embed_patches(IMAGES(), LAYOUT, leaf(DIM, 3, 2, 2)), EMBED, 2 * EMBED),
    "embedding of plain images": (
        lambda: sk.embed_patches(IMAGES().detach(), LAYOUT, leaf(DIM, 3, 2, 2)), EMBED, EMBED,
    ),
    "attention": (
        lambda: sk.ragged_attention(*(rows(HEADS, HEAD_DIM) for _ in range(3)), CU_SEQLENS, 9),
        *attention_flops([(length, length) for length in LENGTHS]),
    ),
    "class attention": (
        lambda: sk.class_attention(QUERIES(), rows(HEADS, HEAD_DIM), rows(HEADS, HEAD_DIM), CU_SEQLENS, 9), *TO_IMAGES,
    ),
    "class attention, through its scores": (
        lambda: sk.class_attention(
            QUERIES(), rows(HEADS, HEAD_DIM), rows(HEADS, HEAD_DIM), CU_SEQLENS, 9, return_scores=True
        )[1],
        TO_IMAGES[0], TO_IMAGES[0],
    ),
    "class scores": (
        lambda: sk.class_scores(leaf(len(LENGTHS), CLASSES, DIM), rows(DIM), CU_SEQLENS), SCORES, 2 * SCORES,
    ),
    "masked attention": (
        lambda: sk.masked_attention(*(leaf(2, HEADS, 7, HEAD_DIM) for _ in range(3)), KEEP),
        *attention_flops([(3, 3), (6, 6)]),
    ),
    "masked attention, all keys": (
        lambda: sk.masked_attention(*(leaf(2, HEADS, 7, HEAD_DIM) for _ in range(3)), KEEP, keys="all"),
        *attention_flops([(3, 7), (6, 7)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str) -> None:
    call, forward, backward = CASES[name]
    with FlopCounterMode(display=False) as counter:
        out = call()
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward


@torch.no_grad()
def test_exit_head() -> None:
    with FlopCounterMode(display=False) as counter:
        sk.exit_head(rows(DIM), None, None, leaf(CLASSES, DIM), None, LAYOUT, 0.5)
    assert counter.get_total_flops() == LINEAR


def test_every_op_with_matmuls_has_a_formula() -> None:
    without = {name for name in sk.library.schemas if "attention" in name or "linear" in name or "embed" in name}
    assert without - step_kernels.flops.MACS.keys() == {"attention_schedule"}
