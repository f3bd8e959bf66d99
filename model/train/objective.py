"""What each stage of training learns, and its loss on a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import SupertokenLayout
from ...checks import check_choice
from ..heads.canvas import LOG_PROBABILITIES
from ..policies.cts import CTSPolicy
from ..policies.net import PolicyNet
from ..policies.oracle import block_purity
from ..segmenter import StepSegmenter
from .losses import consistency_loss, exit_loss, merging_cost, merging_loss, policy_loss, segmentation_loss

__all__ = ["STAGES", "Features", "Objective", "features_of"]

STAGES = ("heads", "policy", "exits", "all")


@dataclass(frozen=True, eq=False)
class Features:
    """What the heads see of a batch when no token halts."""

    layout: SupertokenLayout
    at_exits: dict[int, Tensor]  # by block: [T, D]
    tokens: Tensor  # [T, D] after the final norm

    def to(self, device: torch.device, dtype: torch.dtype) -> Features:
        at_exits = {number: tokens.to(device, dtype) for number, tokens in self.at_exits.items()}
        return Features(self.layout.to(device), at_exits, self.tokens.to(device, dtype))


@torch.no_grad()
def features_of(segmenter: StepSegmenter, images: Tensor, *, merged: bool) -> Features:
    """The frozen backbone's part: [B, C, H, W], normalised, on supertokens or on all patches."""
    encoder = segmenter.encoder if merged else segmenter.encoder.with_policy(None)
    now, at_exits = encoder.start(images), dict[int, Tensor]()
    for number in range(1, encoder.vit.depth + 1):
        now.tokens = encoder.vit.packed_block(number, now.tokens, now.inputs)
        if number in encoder.exit_heads():
            at_exits[number] = now.tokens
    return Features(now.inputs.layout, at_exits, encoder.vit.packed_norm(now.tokens, now.inputs.layout))


class Objective(nn.Module):
    """The loss of a stage as a module, so that DistributedDataParallel can wrap it.

    - ``heads``: decoder and exits on the frozen backbone's tokens, nothing merged: cross-entropy of each (DToP's auxiliary
      heads, arXiv 2308.01045, count ``exit_weight``).
    - ``policy``: the policy network on `block_purity`, or with ``tolerance`` on `merging_cost`.
    - ``exits``: as heads, on merged tokens; nothing halts.
    - ``all``: backbone, decoder and exits, on merged tokens, of which those halt that the exits' thresholds let; each exit
      learns from all tokens that reach it. The policy stays as it is.

    Args:
        segmenter: with a `PolicyNet` or `CTSPolicy` for the stage ``policy``; `LinearExit`, `CosineExit` and a linear or mask
            transformer decoder for the others.
        stage: one of the above.
        ignore_index: label of pixels that do not count.
        exit_weight: of each exit's loss.
        consistency: weight of `consistency_loss` against the same backbone where nothing merges or halts; stage ``all`` only.
        tolerance: of `merging_loss`; 0: `policy_loss`.
        class_weights: [C], of `merging_cost`; all 1 where None.

    Raises:
        NotImplementedError: a policy that is not learned, ATM exits or decoder: DToP's own code trains those.
        ValueError: an unknown stage.
    """

    def __init__(
        self,
        segmenter: StepSegmenter,
        stage: str,
        *,
        ignore_index: int = 255,
        exit_weight: float = 0.4,
        consistency: float = 0.0,
        tolerance: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("stage", stage, STAGES)
        policy: Any = segmenter.encoder.policy
        if stage == "policy" and not isinstance(policy, (PolicyNet, CTSPolicy)):
            raise NotImplementedError(
                f"policy: expected a PolicyNet or CTSPolicy to train, got {type(policy).__name__}"
            )
        if stage != "policy" and segmenter.decoder.writes != LOG_PROBABILITIES:
            raise NotImplementedError(
                f"segmenter: expected heads that write log-probabilities, got {type(segmenter.decoder).__name__}, "
                "whose mask classification losses are not part of this package"
            )
        self.segmenter, self.stage, self.ignore_index = segmenter, stage, ignore_index
        self.exit_weight, self.consistency, self.tolerance = exit_weight, consistency, tolerance
        self.class_weights = torch.ones(segmenter.num_classes) if class_weights is None else class_weights
        self.patch_size = segmenter.encoder.vit.patch_size

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.stage == "policy":  # inside of the encoder it stays in eval mode
            self.policy.train(mode)
        return self

    def learned(self) -> dict[str, nn.Parameter]:
        """The stage's parameters by name; all others are frozen."""
        chosen = {
            "policy": ("encoder.policy.",),
            "heads": ("encoder.exits.", "decoder."),
            "exits": ("encoder.exits.", "decoder."),
            "all": ("encoder.vit.", "encoder.exits.", "decoder."),
        }[self.stage]
        found = {name: p for name, p in self.segmenter.named_parameters() if name.startswith(chosen)}
        for parameter in self.segmenter.parameters():
            parameter.requires_grad_(False)
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found

    @property
    def policy(self) -> Any:
        return self.segmenter.encoder.policy

    @property
    def frozen_backbone(self) -> bool:
        return self.stage in ("heads", "exits")

    def features(self, images: Tensor) -> Features:
        return features_of(self.segmenter, images, merged=self.stage == "exits")

    def forward(self, batch: Tensor | Features, labels: Tensor) -> dict[str, Tensor]:
        """Losses by name, and their weighted sum as ``"loss"``, in which every labelled pixel of all processes counts alike.

        ``batch``: images [B, C, H, W], normalised, or their `Features` where the backbone is frozen.
        """
        if self.stage == "policy":
            parts = {"policy": self._policy(batch, labels)}
        else:
            parts = self._heads(batch, labels) if self.frozen_backbone else self._all(batch, labels)
            share = self._share((labels.long() != self.ignore_index).sum())
            parts = {name: loss * share if name != "consistency" else loss for name, loss in parts.items()}
        weights = {"decoder": 1.0, "policy": 1.0, "consistency": self.consistency}
        weighted = [weights.get(name, self.exit_weight) * loss for name, loss in parts.items()]
        return parts | {"loss": torch.stack(weighted).sum()}

    def _share(self, count: Tensor) -> Tensor:
        """1 over the labelled pixels of all processes, times their number, as gradients are averaged over processes."""
        total, world = count.float(), 1
        if dist.is_initialized():
            world = dist.get_world_size()
            dist.all_reduce(total)
        return world / total.clamp(min=1)

    def _policy(self, images: Tensor | Features, labels: Tensor) -> Tensor:
        assert isinstance(images, Tensor)
        pixels, _ = self.segmenter.encoder.vit.on_grid(images)
        told: dict[str, Any] = {"patch_size": self.patch_size, "ignore_index": self.ignore_index}
        if self.tolerance:
            targets = merging_cost(labels, self.class_weights, self.policy.sides, **told)
        else:
            targets = block_purity(labels, self.policy.sides, **told)
        if not targets:
            least = self.policy.sides[0] * self.patch_size
            got = f"{labels.shape[1]} x {labels.shape[2]}"
            raise ValueError(
                f"images: expected {least} pixels a side, which the policy's smallest block has, got {got}"
            )
        if self.training and targets[-1].numel() == 1:
            got = f"one picture of {labels.shape[1]} x {labels.shape[2]}"
            raise ValueError(f"images: expected several of the largest blocks for batch norm, got {got}")
        logits = self.policy.logits(pixels, patch_size=self.patch_size)
        if isinstance(logits, Tensor):  # CTS's network has one for each of two classes
            logits = [logits[:, 1] - logits[:, 0]]
        return (
            merging_loss(logits, targets, tolerance=self.tolerance) if self.tolerance else policy_loss(logits, targets)
        )

    def _named(self) -> dict[str, Any]:
        return {"patch_size": self.patch_size, "ignore_index": self.ignore_index, "reduction": "sum"}

    def _heads(self, batch: Tensor | Features, labels: Tensor) -> dict[str, Tensor]:
        seen = self.features(batch) if isinstance(batch, Tensor) else batch
        exits, decoder = self.segmenter.encoder.exit_heads(), self.segmenter.decoder
        parts = {}
        for number, tokens in seen.at_exits.items():
            scores = exits[number].scores(tokens, seen.layout)
            parts[f"exit {number}"] = exit_loss(scores, seen.layout, labels, **self._named())
        scores = decoder.complete(seen.tokens, seen.layout, None)
        return parts | {"decoder": segmentation_loss(scores, labels, **self._named())}

    def _all(self, images: Tensor | Features, labels: Tensor) -> dict[str, Tensor]:
        assert isinstance(images, Tensor)
        encoder, vit, parts = self.segmenter.encoder, self.segmenter.encoder.vit, dict[str, Tensor]()
        now, exits = encoder.start(images), encoder.exit_heads()
        for number in range(1, vit.depth + 1):
            now.tokens = vit.packed_block(number, now.tokens, now.inputs)
            if number in exits:
                scores = exits[number].scores(now.tokens, now.inputs.layout)
                parts[f"exit {number}"] = exit_loss(scores, now.inputs.layout, labels, **self._named())
                encoder.take_exit(now, number, exits[number])
        layout = now.inputs.layout
        scores = self.segmenter.decoder.complete(vit.packed_norm(now.tokens, layout), layout, now.canvas)
        parts["decoder"] = segmentation_loss(scores, labels, **self._named())
        if self.consistency:
            with torch.no_grad():
                dense = features_of(self.segmenter, images, merged=False)
                target = self.segmenter.decoder.complete(dense.tokens, dense.layout, None)
            parts["consistency"] = consistency_loss(scores, target)
        return parts
