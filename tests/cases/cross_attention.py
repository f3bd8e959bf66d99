"""Inputs of masked_attention and class_attention, and the comparison that the tests of their kernels share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tensors import error_rule, identical
from torch import Tensor

import step_kernels as sk


@dataclass
class Masked:
    """q, k and v [B, H, L, D], views of one tensor [B, L, 4, H, D] with the cotangent; with ``keys="kept"`` NaN in rows not kept."""

    keep: Tensor
    qkv: list[Tensor]
    cotangent: Tensor
    keys: str = "kept"
    scale: float | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """q, k, v and the cotangent."""
        return [x.detach() for x in (*self.qkv, self.cotangent)]

    def to(self, *where: Any) -> Masked:
        device = next((x for x in where if not isinstance(x, torch.dtype)), self.keep.device)  # a mask keeps its dtype
        return masked_of(self.keep.to(device), [x.to(*where) for x in self.tensors], self.keys, self.scale)

    def images(self) -> Iterator[tuple[slice, Masked]]:
        """Each image: its index, and a batch of it alone."""
        for number in range(len(self.keep)):
            one = slice(number, number + 1)
            yield one, masked_of(self.keep[one], [x[one].clone() for x in self.tensors], self.keys, self.scale)

    def run(self) -> list[Tensor]:
        """Output and gradients of q, k and v, by the backend in force."""
        out = sk.masked_attention(*self.qkv, self.keep, keys=self.keys, scale=self.scale)
        return [out.detach(), *torch.autograd.grad(out, self.qkv, self.cotangent)]

    def plain(self) -> list[Tensor]:
        """The same by plain PyTorch: scaled_dot_product_attention of each image's kept rows."""
        leaves = [x.detach().clone().requires_grad_() for x in self.qkv]
        out = torch.zeros_like(leaves[0])
        for image, keep in enumerate(self.keep):
            q, k, v = (x[image : image + 1] for x in leaves)
            if keep.any():
                chosen = keep if self.keys == "kept" else slice(None)
                rows = F.scaled_dot_product_attention(q[:, :, keep], k[:, :, chosen], v[:, :, chosen], scale=self.scale)
                index = keep.nonzero().flatten()
                out = out.index_put((torch.tensor(image), torch.arange(out.shape[1])[:, None], index), rows[0])
        if not out.requires_grad:
            return [out] * 4
        return [out.detach(), *torch.autograd.grad(out, leaves, self.cotangent)]

    def zero_rows(self) -> list[Tensor]:
        """Where the output, and each gradient, must be exactly zero: [B, L]."""
        idle = ~self.keep if self.keys == "kept" else ~self.keep.any(1, keepdim=True).expand_as(self.keep)
        return [~self.keep, ~self.keep, idle, idle]


def masked_of(keep: Tensor, tensors: Sequence[Tensor], keys: str = "kept", scale: float | None = None) -> Masked:
    """Of q, k, v and the cotangent."""
    *qkv, cotangent = (x.detach() for x in tensors)
    return Masked(keep, [x.requires_grad_() for x in qkv], cotangent, keys, scale)


def masked(
    batch: int,
    heads: int,
    length: int,
    dim: int,
    dtype: torch.dtype,
    *,
    share: float = 0.6,
    keys: str = "kept",
    scale: float | None = None,
) -> Masked:
    """A random mask; the first image is whole, the third empty."""
    keep = torch.rand(batch, length) < share
    keep[:1], keep[2:3] = True, False
    tensor = torch.randn(batch, length, 4, heads, dim).to(dtype)
    queries, dropped = tensor[:, :, ::3], ~keep[:, :, None, None, None]
    queries.masked_fill_(dropped, math.nan)
    if keys == "kept":
        tensor.masked_fill_(dropped, math.nan)
    return masked_of(keep, tensor.permute(2, 0, 3, 1, 4).unbind(0), keys, scale)


def every_row_finite(case: Masked) -> Masked:
    """The same without the NaN in rows that are not kept, so that another mask may keep them."""
    for x in (*case.qkv, case.cotangent):
        x.data.nan_to_num_(0.5)
    return case


@dataclass
class Classes:
    """q [B, C, H, D]; k and v [T, H, D], views of one tensor with NaN past the live rows; cotangents of output and scores."""

    lengths: tuple[int, ...]
    inputs: list[Tensor]
    cotangents: list[Tensor]
    scale: float | None = None

    @property
    def live(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        offsets = list(itertools.accumulate(self.lengths, initial=0))
        return torch.tensor(offsets, dtype=torch.int32, device=self.inputs[0].device)

    @property
    def tensors(self) -> list[Tensor]:
        """q, k, v and the cotangents."""
        return [x.detach() for x in (*self.inputs, *self.cotangents)]

    def to(self, *where: Any) -> Classes:
        return classes_of(self.lengths, [x.to(*where) for x in self.tensors], self.scale)

    def images(self) -> Iterator[tuple[slice, slice, Classes]]:
        """Each image: its index, its tokens' rows, and a batch of it alone."""
        for number, (start, stop) in enumerate(itertools.pairwise(itertools.accumulate(self.lengths, initial=0))):
            one, rows = slice(number, number + 1), slice(start, stop)
            pieces = zip(self.tensors, (one, rows, rows, one, rows), strict=True)
            yield one, rows, classes_of((stop - start,), [x[piece].clone() for x, piece in pieces], self.scale)

    def run(self, *, scores: bool = True, tail: str = "zero", cu_seqlens: Tensor | None = None) -> list[Tensor]:
        """Output, with ``scores`` the mean scores, and gradients of q, k and v, by the backend in force."""
        cu_seqlens = self.cu_seqlens if cu_seqlens is None else cu_seqlens
        result = sk.class_attention(
            *self.inputs, cu_seqlens, max(self.lengths, default=0), scale=self.scale, return_scores=scores, tail=tail
        )
        result = result if scores else (result,)
        grads = torch.autograd.grad(result, self.inputs, self.cotangents[: len(result)])
        return [*(x.detach() for x in result), *grads]

    def plain(self) -> list[Tensor]:
        """The same by plain PyTorch in the same dtype; live rows of scores and gradients."""
        q, k, v = leaves = [x.detach().requires_grad_() for x in self.inputs]
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        out, scores = [torch.zeros_like(q[:0])], [k.new_zeros(0, q.shape[1])]
        for image, (start, stop) in enumerate(itertools.pairwise(itertools.accumulate(self.lengths, initial=0))):
            heads = [x.transpose(0, 1)[None] for x in (q[image], k[start:stop], v[start:stop])]
            some = stop > start
            attended = F.scaled_dot_product_attention(*heads, scale=scale)[0].transpose(0, 1) if some else 0 * q[image]
            out.append(attended[None])
            scores.append((heads[1][0] @ heads[0][0].mT * scale).mean(0))
        result = torch.cat(out), torch.cat(scores)
        grads = torch.autograd.grad(
            result, leaves, [self.cotangents[0], self.cotangents[1][: self.live]], allow_unused=True
        )
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return [*(x.detach() for x in result), grads[0], *(g[: self.live] for g in grads[1:])]


def classes_of(lengths: Sequence[int], tensors: Sequence[Tensor], scale: float | None = None) -> Classes:
    """Of q, k, v and the cotangents of output and scores."""
    q, k, v, *cotangents = (x.detach() for x in tensors)
    return Classes(tuple(lengths), [x.requires_grad_() for x in (q, k, v)], cotangents, scale)


def classes(
    lengths: Sequence[int],
    num_classes: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    spare: int = 3,
    scale: float | None = None,
) -> Classes:
    live = sum(lengths)
    tokens = torch.randn(live + spare, 2, heads, dim).to(dtype)
    scores = torch.randn(live + spare, num_classes).to(dtype)
    tokens[live:], scores[live:] = math.nan, math.nan
    q, cotangent = torch.randn(2, len(lengths), num_classes, heads, dim).to(dtype)
    return classes_of(lengths, [q, *tokens.unbind(1), cotangent, scores], scale)


def masked_within_the_rule(case: Masked, found: list[Tensor]) -> None:
    """Output and gradients against fp64 by the error rule; exact zeros in the rows that take no part. The yardstick is computed where the case lies."""
    with sk.use_backend("reference"):
        truth, zeros = case.to("cpu", torch.float64).run(), [x.cpu() for x in case.zero_rows()]
    for ours, plain, exact, zero in zip(found, [x.cpu() for x in case.plain()], truth, zeros, strict=True):
        assert not ours.transpose(1, 2)[zero].any(), "a row that takes no part is not zero"
        chosen = ~zero
        error_rule(*(x.transpose(1, 2)[chosen] for x in (ours, plain, exact)))


def classes_within_the_rule(case: Classes, found: list[Tensor]) -> None:
    """Output, scores and gradients against fp64 by the error rule; tails zero. The yardstick is computed where the case lies."""
    with sk.use_backend("reference"):
        truth = case.to("cpu", torch.float64).run()
    rows = [len(case.lengths), case.live, len(case.lengths), case.live, case.live]
    for ours, plain, exact, live in zip(found, case.plain(), truth, rows, strict=True):
        error_rule(ours[:live], plain.cpu(), exact[:live])
        assert not ours[live:].any(), "a tail is not zero"


def images_of_masks_do_not_matter_to_each_other(case: Masked) -> None:
    together = case.run()
    for one, alone in case.images():
        identical(alone.run(), [x[one] for x in together])


def images_of_classes_do_not_matter_to_each_other(case: Classes) -> None:
    together = case.run()
    for one, rows, alone in case.images():
        identical(alone.run(), [x[i] for x, i in zip(together, (one, rows, one, rows, rows), strict=True)])
