"""Packed queries, keys and values to attend to, and one comparison that every attention test shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tensors import error_rule, gradients, identical
from torch import Tensor

import step_kernels as sk


@dataclass
class Case:
    """Tensors [T, H, D] whose rows past the live count are NaN, as views of one qkv tensor, and a cotangent."""

    lengths: tuple[int, ...]
    qkv: list[Tensor]
    cotangent: Tensor
    bias: Tensor | None = None
    scale: float | None = None

    @property
    def live(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        offsets = list(itertools.accumulate(self.lengths, initial=0))
        return torch.tensor(offsets, dtype=torch.int32, device=self.cotangent.device)

    @property
    def tensors(self) -> list[Tensor]:
        """q, k, v and the cotangent."""
        return [x.detach() for x in (*self.qkv, self.cotangent)]

    def to(self, *where: str | torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(*where)
        return case_of(self.lengths, [x.to(*where) for x in self.tensors], bias, self.scale)

    def images(self) -> Iterator[tuple[slice, Case]]:
        """Each image that has tokens: its rows, and a batch of it alone."""
        for start, stop in itertools.pairwise(itertools.accumulate(self.lengths, initial=0)):
            if start < stop:
                yield slice(start, stop), case_of((stop - start,), [x[start:stop].clone() for x in self.tensors])

    def run(self, *, tail: str = "zero", scheduled: bool = False, max_seqlen: int | None = None) -> list[Tensor]:
        """Output and gradients of q, k and v, by the backend in force."""
        cu_seqlens, rows = self.cu_seqlens, self.cotangent.shape[0]
        schedule = sk.attention_schedule(cu_seqlens, rows) if scheduled else None
        longest = max(self.lengths, default=0) if max_seqlen is None else max_seqlen
        out = sk.ragged_attention(
            *self.qkv, cu_seqlens, longest, scale=self.scale, key_bias=self.bias, schedule=schedule, tail=tail
        )
        return [out.detach(), *torch.autograd.grad(out, self.qkv, self.cotangent)]

    def plain(self) -> list[Tensor]:
        """The same by plain PyTorch in the same dtype: the live rows."""
        leaves = [x.detach()[: self.live].requires_grad_() for x in self.qkv]
        images = [leaves[0][:0]]
        for start, stop in itertools.pairwise(itertools.accumulate(self.lengths, initial=0)):
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in leaves)
            mask = None if self.bias is None else self.bias[start:stop].to(q.dtype).expand(1, 1, stop - start, -1)
            if stop > start:
                image = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
                images.append(image[0].transpose(0, 1))
        out = torch.cat(images)
        return [out.detach(), *gradients(out, leaves, self.cotangent[: self.live])]


def case_of(
    lengths: Sequence[int], tensors: Sequence[Tensor], bias: Tensor | None = None, scale: float | None = None
) -> Case:
    """Of q, k, v and the cotangent."""
    *qkv, cotangent = (x.detach() for x in tensors)
    return Case(tuple(lengths), [x.requires_grad_() for x in qkv], cotangent, bias, scale)


def make_case(
    lengths: Sequence[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    spare: int = 3,
    biased: bool = False,
    scale: float | None = None,
) -> Case:
    live = sum(lengths)
    tensor = torch.randn(live + spare, 4, heads, dim).to(dtype)
    tensor[live:] = math.nan
    bias = None
    if biased:
        bias = torch.randn(live + spare)
        bias[live:] = math.nan
    return case_of(lengths, tensor.unbind(1), bias, scale)


def overflowing(*lengths: int) -> Case:
    """q . k reaches 2.6e6, forty times what fp16 holds.

    In units of log2 the scale is an eighth, so that scores stay exact: else the GPU's fused product, rounded once where the interpreter
    rounds twice, makes the heaviest weight a percent more than 1.
    """
    case = make_case(lengths, 1, 64, torch.float16, scale=math.log(2) / 8)
    for x in case.qkv[:2]:
        x.data += 200
    return of_integers(case)


def of_integers(case: Case) -> Case:
    """The same, rounded to integers, whose sums are exact in any order: then gradients through a single key are zero, as they should be."""
    for x in (*case.qkv, case.cotangent):
        x.data = x.data.round()
    return case


def assert_within_the_rule(case: Case, found: list[Tensor]) -> None:
    """Output and gradients against fp64 by the error rule, tails zero; the yardstick is computed where the case lies."""
    with sk.use_backend("reference"):
        truth = case.to("cpu", torch.float64).run()
    for ours, plain, exact in zip(found, case.plain(), truth, strict=True):
        if case.live:
            error_rule(ours[: case.live], plain.cpu(), exact[: case.live])
        assert not ours[case.live :].any(), "a tail is not zero"


def batch_mates_do_not_matter(case: Case) -> None:
    together = case.run()
    for rows, alone in case.images():
        identical(alone.run(), [x[rows] for x in together])


def nan_does_not_leak(case: Case, rows: slice) -> None:
    """NaN in these rows of q, k, v and the cotangent changes no bit of another live row."""
    spoilt = [x.clone() for x in case.tensors]
    for x in spoilt:
        x[rows] = math.nan
    spared = sorted({*range(case.live)} - {*range(*rows.indices(case.live))})
    found = case_of(case.lengths, spoilt, case.bias, case.scale).run()
    identical([x[spared] for x in found], [x[spared] for x in case.run()])
