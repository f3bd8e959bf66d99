"""AdamW as ViTs are fine-tuned with: groups by depth, a cosine with warm-up, master weights in fp32 where the model's are half."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Optimizer", "cosine"]


class Optimizer:
    """AdamW over named parameters.

    Weights of half precision are rounded copies of fp32 ones, which the optimizer keeps: steps smaller than their rounding
    are not lost. (The model ignores ``torch.autocast``, as its ops compute in the dtype of their inputs.)

    Args:
        parameters: by the model's names.
        lr: the peak's.
        weight_decay: of matrices; norms, biases, position embeddings and tokens have none.
        layer_decay: factor of the learning rate from block to block, downwards from the last (BEiT, arXiv 2106.08254).
        depth: of the ViT.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], lr: float, weight_decay: float, layer_decay: float, depth: int
    ) -> None:
        self.parameters = list(parameters.values())
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for (name, parameter), master in zip(parameters.items(), self.masters, strict=True):
            decay = 0.0 if parameter.ndim < 2 or re.search(r"pos_embed|cls_token|cls_emb", name) else weight_decay
            groups.setdefault((layer_decay ** (depth + 1 - layer_of(name, depth)), decay), []).append(master)
        self.adamw = torch.optim.AdamW(
            [
                {"params": members, "lr": lr * scale, "peak": lr * scale, "weight_decay": decay}
                for (scale, decay), members in groups.items()
            ]
        )

    def step(self, share: float, clip: float) -> float:
        """One step at ``share`` of the peak's rates; the gradients' norm before clipping. Gradients are zeroed."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(self.masters, clip if clip > 0 else math.inf)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * share
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.grad = None
                if master is not parameter:
                    parameter.copy_(master)
        self.adamw.zero_grad()
        return float(norm)

    def state(self) -> dict[str, object]:
        return {"adamw": self.adamw.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load(self, state: dict[str, object]) -> None:
        self.adamw.load_state_dict(state["adamw"])  # type: ignore[arg-type]
        masters: list[Tensor] = state["masters"]  # type: ignore[assignment]
        for master, saved in zip(self.masters, masters, strict=True):
            master.copy_(saved)


def layer_of(name: str, depth: int) -> int:
    """0 for embeddings, n for block n (1-based), depth + 1 for what follows and for policy, exits and decoder."""
    if match := re.match(r"encoder\.vit\.blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if re.match(r"encoder\.vit\.(patch_embed|pos_embed|cls_token)", name) else depth + 1


def cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the peak's learning rate in step ``step`` (from 0): linear over the first ``warmup`` of the steps, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
