"""Inputs of class_scores, and the comparison that the tests of its floors share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensors import error_rule, identical
from torch import Tensor

import step_kernels as sk


@dataclass
class Scores:
    """q [B, C, D]; k [T, D] and the cotangent [T, C] with NaN past the live rows."""

    lengths: tuple[int, ...]
    q: Tensor
    k: Tensor
    cotangent: Tensor
    scale: float = 1.0

    @property
    def live(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        offsets = list(itertools.accumulate(self.lengths, initial=0))
        return torch.tensor(offsets, dtype=torch.int32, device=self.q.device)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.q.detach().requires_grad_(), self.k.detach().requires_grad_()

    def to(self, *where: Any) -> Scores:
        return replace(self, q=self.q.to(*where), k=self.k.to(*where), cotangent=self.cotangent.to(*where))

    def run(self, *, tail: str = "zero", cu_seqlens: Tensor | None = None) -> list[Tensor]:
        """Scores and gradients of q and k, by the backend in force."""
        q, k = self.leaves()
        cu_seqlens = self.cu_seqlens if cu_seqlens is None else cu_seqlens
        scores = sk.class_scores(q, k, cu_seqlens, scale=self.scale, tail=tail)
        return [scores.detach(), *torch.autograd.grad(scores, (q, k), self.cotangent)]

    def plain(self) -> list[Tensor]:
        """The same by plain PyTorch in the same dtype; live rows of scores and of the gradient of k."""
        q, k = self.leaves()
        images = zip(k[: self.live].split(self.lengths), q, strict=True)
        scores = torch.cat([self.q.new_zeros(0, q.shape[1]), *(rows @ own.T * self.scale for rows, own in images)])
        if not scores.requires_grad:  # a batch without images
            return [scores, torch.zeros_like(q), torch.zeros_like(k[:0])]
        grad_q, grad_k = torch.autograd.grad(scores, (q, k), self.cotangent[: self.live])
        return [scores.detach(), grad_q, grad_k[: self.live]]


def scores_case(
    lengths: Sequence[int],
    num_classes: int,
    dim: int,
    dtype: torch.dtype,
    *,
    spare: int = 3,
    scale: float = 1.0,
) -> Scores:
    live = sum(lengths)
    q, k, cotangent = (
        torch.randn(shape, dtype=torch.float64).to(dtype)
        for shape in ((len(lengths), num_classes, dim), (live + spare, dim), (live + spare, num_classes))
    )
    k[live:], cotangent[live:] = math.nan, math.nan
    return Scores(tuple(lengths), q, k, cotangent, scale)


def scores_within_the_rule(case: Scores, found: list[Tensor]) -> None:
    """Scores and gradients against fp64 by the error rule; tails zero."""
    with sk.use_backend("reference"):
        truth = case.to(torch.float64).run()
    rows = [case.live, len(case.lengths), case.live]
    for ours, plain, exact, live in zip(found, case.plain(), truth, rows, strict=True):
        error_rule(ours[:live], plain, exact[:live])
        assert not ours[live:].any(), "a tail is not zero"


def batch_mates_do_not_matter(case: Scores) -> None:
    together = case.run()
    for image, (start, stop) in enumerate(itertools.pairwise(itertools.accumulate(case.lengths, initial=0))):
        rows, one = slice(start, stop), slice(image, image + 1)
        tensors = (x.clone() for x in (case.q[one], case.k[rows], case.cotangent[rows]))
        alone = Scores((stop - start,), *tensors, case.scale).run()
        identical(alone, [x[i] for x, i in zip(together, (rows, one, rows), strict=True)])
