"""CTS, DToP and both of them as eager code runs them: confident tokens leave, what is left of each image goes on alone, in a loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import Trace, ViT
from step_kernels.model.vit import Block

from ..engine import NotRun
from ..layouts import NUM_PREFIX, gone_at
from ..options import PATCH_SIZE
from ..segmenters import DENSE, EXITS, MERGED_EXITS, Segmenters, plain_upsample_argmax

Attend = Callable[..., Tensor]  # of q, k and v [B, H, L, D]
CERTAIN = 2.0  # above any threshold of a probability


def stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matmul, softmax, matmul: [B, H, L, L] goes to memory, as in the code that CTS and DToP are built on."""
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v


@dataclass(frozen=True)
class Decisions:
    """Decisions on one input. Tokens stand image by image, in each by side and in raster order; class tokens are not among them."""

    blocks: dict[int, Tensor]  # side -> bool [B, rows // side, cols // side], which blocks are tokens
    order: Tensor  # int64 [tokens], from side by side to image by image
    lengths: tuple[int, ...]  # tokens of what goes through the model together: of each image, or of the whole batch
    cells: Tensor  # int64 [B, rows, cols], the number of the token that covers a cell
    halted: Tensor  # bool [tokens], who leaves at the exit, if there is one

    def sequences(self, values: Tensor) -> list[Tensor]:
        """[tokens, ...] -> [images, tokens of each, ...] of what goes through the model together."""
        images = self.cells.shape[0] // len(self.lengths)
        return [part.unflatten(0, (images, -1)) for part in values.split(self.lengths)]


def decisions_of(trace: Trace, sides: tuple[int, ...], *, per_image: bool) -> Decisions:
    """Raises NotRun where blocks have other sides or, unless images go through the model alone, their numbers of tokens differ."""
    covered = trace.layout.sides().long()
    blocks = {side: whole_blocks(covered, side)[:, ::side, ::side] == side for side in sides}
    found = [(mask.nonzero() * torch.tensor([1, side, side], device=mask.device)) for side, mask in blocks.items()]
    order = torch.cat(found)[:, 0].argsort(stable=True)
    corners = torch.cat(found)[order].unbind(1)
    lengths = corners[0].bincount().tolist()
    if not set(covered.unique().tolist()) <= set(sides) or not (per_image or len(set(lengths)) == 1):
        raise NotRun("needs the same number of tokens in every image, and 2x2 blocks alone")
    numbers = torch.zeros_like(covered).index_put(corners, torch.arange(len(order), device=order.device))
    image, row, col = torch.ones_like(covered).nonzero().t().unflatten(1, covered.shape)
    cells = numbers[image, row // covered * covered, col // covered * covered]
    gone = gone_at(trace, trace.stages[0]) if trace.stages else torch.zeros_like(covered, dtype=torch.bool)
    return Decisions(blocks, order, tuple(lengths if per_image else [len(order)]), cells, gone[corners])


def whole_blocks(picture: Tensor, side: int) -> Tensor:
    """[..., rows, cols] without what is left at the edges."""
    return picture[..., : picture.shape[-2] // side * side, : picture.shape[-1] // side * side]


def shrink(picture: Tensor, side: int) -> Tensor:
    """Bilinear for 2x2, as CTS; the mean for larger blocks, of which bilinear would see the four middle pixels alone."""
    if side != 2:
        return picture if side == 1 else F.avg_pool2d(picture, side)
    return F.interpolate(picture, scale_factor=0.5, mode="bilinear", align_corners=False)


def shared_tokens(vit: ViT, images: Tensor, decisions: Decisions) -> Tensor:
    """[tokens, D] of the whole batch: each block shrunk to a patch and embedded, with its position."""
    rows, cols = decisions.cells.shape[1:]
    picture = vit.grid_positions((rows, cols)).t().unflatten(1, (rows, cols))[None]
    pixels, places = [], []
    for side, mask in decisions.blocks.items():
        small = shrink(whole_blocks(images, side * PATCH_SIZE), side)
        pixels.append(F.pixel_unshuffle(small, PATCH_SIZE).permute(0, 2, 3, 1)[mask])
        own = shrink(whole_blocks(picture, side), side).permute(0, 2, 3, 1)
        places.append(own.expand(*mask.shape, -1)[mask])
    projection = vit.patch_embed.proj
    tokens = F.linear(torch.cat(pixels), projection.weight.flatten(1), projection.bias) + torch.cat(places)
    return tokens[decisions.order]


class Peer:
    """A method that repeats a family's decisions, with the parameters of the segmenters; NotRun where it cannot.

    `per_image`: the images go through the blocks one by one, since their counts differ; else together up to the exit.
    """

    def __init__(self, segmenters: Segmenters, family: str, attend: Attend, *, per_image: bool = False) -> None:
        self._segmenters, self._attend, weights = segmenters, attend, segmenters.weights
        self._vit, self._decoder, self._blocks = weights.vit, weights.decoder, cast(Sequence[Block], weights.vit.blocks)
        self._exits = weights.exits if family in (EXITS, MERGED_EXITS) else {}
        self._merges = family not in (DENSE, EXITS)
        self._grid = segmenters.size[0] // PATCH_SIZE, segmenters.size[1] // PATCH_SIZE
        self._policy = copy.copy(weights.policy)  # scores of no other sides than it merges
        largest = min(self._grid) if per_image else 2
        self._policy.sides = tuple(side for side in weights.policy.sides if side <= largest)
        sides = (1, *self._policy.sides) if self._merges else (1,)
        self._decisions = [decisions_of(one, sides, per_image=per_image) for one in segmenters.decisions(family)]

    @torch.no_grad()
    def labels(self, number: int) -> Tensor:
        """Labels [batch, height, width] of an input, the policy asked and not listened to."""
        decisions = self._decisions[number]
        blocks, prefix = self._tokens(self._segmenters.inputs[number], decisions), self._vit.prefix_tokens()
        sequences = [torch.cat([prefix.expand(len(own), -1, -1), own], 1) for own in blocks]
        predictions = self._scores(sequences, decisions)
        if self._merges:
            scores = torch.cat([own.flatten(0, 1) for own in predictions])[decisions.cells].permute(0, 3, 1, 2)
        else:
            scores = predictions[0].transpose(1, 2).unflatten(2, self._grid)
        return plain_upsample_argmax(scores, self._segmenters.size)

    def _tokens(self, images: Tensor, decisions: Decisions) -> list[Tensor]:
        """[images, tokens, D] of those that start together, without prefix tokens."""
        if not self._merges:
            return [self._vit.patch_embed(images) + self._vit.grid_positions(self._grid)]
        self._policy.scores(images, patch_size=PATCH_SIZE)
        return decisions.sequences(shared_tokens(self._vit, images, decisions))

    def _scores(self, sequences: list[Tensor], decisions: Decisions) -> list[Tensor]:
        """[images, tokens, classes] of all tokens but the class token.

        With an exit they are log-probabilities: each image goes on alone, and who stays writes over its prediction, as in DToP.
        Confidences are computed as in a free run, and replaced by the recorded decision before they are compared.
        """
        last, head = next(iter(self._exits.items()), (len(self._blocks), None))
        for block in self._blocks[:last]:
            sequences = [self._block(block, x) for x in sequences]
        if head is None:
            return [self._decoder.head(self._vit.norm(x[:, NUM_PREFIX:])) for x in sequences]
        predictions, alone = list[Tensor](), list[tuple[Tensor, Tensor, Tensor]]()
        for x, halted in zip(sequences, decisions.sequences(decisions.halted), strict=True):
            log_probabilities = head.head(head.norm(x[:, NUM_PREFIX:])).log_softmax(2, dtype=torch.float32)
            confidence = torch.where(halted, CERTAIN, 0.0 * log_probabilities.amax(2).exp())
            stays, written = ~(confidence > head.threshold), log_probabilities.to(x.dtype)
            predictions.append(written)
            alone += zip(x, stays, written, strict=True)
        for image, stay, out in alone:
            tokens = torch.cat([image[:NUM_PREFIX], image[NUM_PREFIX:][stay]])[None]
            for block in self._blocks[last:]:
                tokens = self._block(block, tokens)
            scores = self._decoder.head(self._vit.norm(tokens[0, NUM_PREFIX:]))
            out[stay] = scores.log_softmax(1, dtype=torch.float32).to(out.dtype)
        return predictions

    def _block(self, block: Block, tokens: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        batch, length, dim = tokens.shape
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(tokens)).view(batch, length, 3, heads, dim // heads)
        mixed = self._attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        tokens = tokens + block.attn.proj(mixed.transpose(1, 2).reshape(batch, length, dim))
        return tokens + cast(Tensor, block.mlp(block.norm2(tokens)))
