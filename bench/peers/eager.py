"""CTS, DToP and both of them as eager code runs them: confident tokens leave, what is left of each image goes on alone, in a loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model.vit import Block

from ..engine import Contender
from ..options import PATCH_SIZE
from ..segmenters import DENSE, EXITS, MERGED_EXITS, Segmenters, plain_upsample_argmax
from .sharing import Decisions, back_to_cells, decisions_of, shared_tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k and v [B, H, L, D]
CERTAIN = 2.0  # above any threshold of a probability
ONE_PATCH, CTS_SIDES = (1,), (1, 2)


def stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matmul, softmax, matmul: [B, H, L, L] goes to memory, as in the code that CTS and DToP are built on."""
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, on the backend that PyTorch picks."""
    return F.scaled_dot_product_attention(q, k, v)


def peer(segmenters: Segmenters, family: str, attend: Attend, *, per_image: bool = False) -> Contender:
    """A method that repeats a family's decisions.

    Args:
        segmenters, family, attend: weights, inputs and decisions; which of them; the attention.
        per_image: the images go through the blocks one by one, since their counts differ; else together up to the exit.

    Raises:
        NotRun: it cannot repeat them.
    """
    model = Peer(segmenters, family, attend, per_image=per_image)
    return segmenters.contender(family, model.labels, ours=False, note="PyTorch, eager")


class Peer:
    """The forward pass, with the parameters of the segmenters; arguments as of `peer`."""

    def __init__(self, segmenters: Segmenters, family: str, attend: Attend, *, per_image: bool) -> None:
        self._segmenters, self._attend, self._per_image = segmenters, attend, per_image
        weights = segmenters.weights
        self._vit, self._decoder, self._blocks = weights.vit, weights.decoder, cast(Sequence[Block], weights.vit.blocks)
        self._exits = weights.exits if family in (EXITS, MERGED_EXITS) else {}
        self._grid = segmenters.size[0] // PATCH_SIZE, segmenters.size[1] // PATCH_SIZE
        sides = (1, *weights.policy.sides) if per_image else CTS_SIDES
        sides = ONE_PATCH if family in (DENSE, EXITS) else sides
        self._sides = tuple(side for side in sides if side <= min(self._grid))
        self._policy = copy.copy(weights.policy)
        self._policy.sides = tuple(side for side in self._policy.sides if side in self._sides)  # scores of no others
        groups = [slice(image, image + 1) for image in range(segmenters.batch)] if per_image else [slice(None)]
        self._decisions = [decisions_of(trace, self._sides, groups) for trace in segmenters.decisions(family)]

    @torch.no_grad()
    def labels(self, number: int) -> Tensor:
        """Labels [batch, height, width] of an input, the policy asked and not listened to."""
        decisions = self._decisions[number]
        sequences = self._tokens(self._segmenters.inputs[number], decisions)
        predictions = self._with_exit(sequences, decisions) if self._exits else self._without_exit(sequences)
        cells = [x[:, self._vit.num_prefix :] for x in predictions]
        if self._sides == ONE_PATCH:
            scores = cells[0].transpose(1, 2).unflatten(2, self._grid)
        else:
            scores = back_to_cells(cells, decisions, self._grid)
        return plain_upsample_argmax(scores, self._segmenters.size)

    def _tokens(self, images: Tensor, decisions: Decisions) -> list[Tensor]:
        """[images, tokens, D] of those that start together."""
        vit = self._vit
        if self._sides == ONE_PATCH:
            patches = vit.patch_embed(images) + vit.grid_positions(self._grid)
            return [torch.cat([vit.prefix_tokens().expand(images.shape[0], -1, -1), patches], 1)]
        scores = self._policy.scores(
            images, patch_size=PATCH_SIZE
        )  # dCTS compares them all, CTS takes as many of the best as it may
        _ = (
            [score > 0 for score in scores]
            if self._per_image
            else scores[0].flatten(1).topk(decisions.groups[0].counts[1])
        )
        return shared_tokens(vit, images, decisions)

    def _without_exit(self, sequences: list[Tensor]) -> list[Tensor]:
        """Scores of all tokens."""
        for block in self._blocks:
            sequences = [self._block(block, x) for x in sequences]
        return [self._decoder.head(self._vit.norm(x)) for x in sequences]

    def _with_exit(self, sequences: list[Tensor], decisions: Decisions) -> list[Tensor]:
        """Log-probabilities of all tokens. After the exit each image goes on alone, and who stays writes over its prediction, as in DToP.

        Confidences are computed as in a free run, and replaced by the recorded decision before they are compared.
        """
        ((last, head),) = self._exits.items()
        for block in self._blocks[:last]:
            sequences = [self._block(block, x) for x in sequences]
        predictions, alone = [], []
        for x, group in zip(sequences, decisions.groups, strict=True):
            log_probabilities = head.head(head.norm(x)).log_softmax(2, dtype=torch.float32)
            confidence = torch.where(cast(Tensor, group.halted), CERTAIN, 0.0 * log_probabilities.amax(2).exp())
            stays, written = ~(confidence > head.threshold), log_probabilities.to(x.dtype)
            predictions.append(written)
            alone += [(own[stay][None], stay, out) for own, stay, out in zip(x, stays, written, strict=True)]
        for tokens, stay, out in alone:
            for block in self._blocks[last:]:
                tokens = self._block(block, tokens)
            scores = self._decoder.head(self._vit.norm(tokens))[0]
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
