"""A stand-in for ToMe's package with the interface that bench uses, written from the paper alone (arXiv 2210.09461, section 3).

Before a block's MLP, the r tokens of every second position that are most similar to one of the positions between, by the mean of
their keys over the heads, are merged into it: the mean weighted by size. Attention adds the log of a key's size to its scores.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn


def package() -> dict[str, types.ModuleType]:
    """Modules for ``sys.modules``: `tome` and `tome.patch`, whose `timm` is `patch`."""
    tome, tome_patch = types.ModuleType("tome"), types.ModuleType("tome.patch")
    tome_patch.timm = patch  # type: ignore[attr-defined]
    tome.patch = tome_patch  # type: ignore[attr-defined]
    return {"tome": tome, "tome.patch": tome_patch}


def patch(model: Any, trace_source: bool = False, prop_attn: bool = True) -> None:
    """Makes a timm ViT merge tokens by ``model.r``: (r, -1.0), 2 r of them in the first block, evenly less in each, none in the last."""
    info: dict[str, Any] = {"trace_source": trace_source, "prop_attn": prop_attn}
    model.r, model._tome_info = 0, info
    model.blocks = nn.Sequential(*(MergingBlock(block, info) for block in model.blocks))

    def start(module: Any, inputs: object) -> None:
        (mean, slope), last = module.r, len(module.blocks) - 1
        assert slope == -1.0
        info.update(r=[int(2 * mean - 2 * mean / last * i) for i in range(last + 1)], size=None, source=None)

    model.register_forward_pre_hook(start)


class MergingBlock(nn.Module):
    """A block of timm's in which tokens are merged between attention and MLP."""

    def __init__(self, block: Any, info: dict[str, Any]) -> None:
        super().__init__()
        self.block, self._info = block, info

    def forward(self, tokens: Tensor) -> Tensor:
        info = self._info
        mixed, keys = self.attend(self.block.norm1(tokens))
        tokens, r = tokens + mixed, min(info["r"].pop(0), (tokens.shape[1] - 1) // 2)
        if r > 0:
            places = new_places(keys, r)
            size = torch.ones_like(tokens[:, :, :1]) if info["size"] is None else info["size"]
            info["size"] = gathered_at(places, size, r)
            tokens = gathered_at(places, tokens * size, r) / info["size"]
            if info["trace_source"]:
                source = info["source"]
                if source is None:
                    source = torch.eye(places.shape[1], device=places.device).expand(places.shape[0], -1, -1)
                info["source"] = gathered_at(places, source, r)
        return tokens + self.block.mlp(self.block.norm2(tokens))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention, and the mean of the keys over the heads: [B, L, head_dim]."""
        attention, (batch, length, dim) = self.block.attn, x.shape
        qkv = attention.qkv(x).view(batch, length, 3, attention.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * attention.scale
        if self._info["size"] is not None and self._info["prop_attn"]:
            scores = scores + self._info["size"].log().mT[:, None]
        return attention.proj((scores.softmax(3) @ v).transpose(1, 2).reshape(batch, length, dim)), k.mean(1)


def new_places(keys: Tensor, r: int) -> Tensor:
    """int [B, L]: where each token goes; those that stay come first, in their order, then the positions between."""
    keys = keys / keys.norm(dim=2, keepdim=True)
    similar = keys[:, ::2] @ keys[:, 1::2].mT
    similar[:, 0] = -torch.inf  # the class token stays
    best, partner = similar.max(2)
    going = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(r).indices, True)
    staying = best.shape[1] - r
    places = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    places[:, ::2] = torch.where(going, staying + partner, (~going).cumsum(1) - 1)
    places[:, 1::2] = staying + torch.arange(keys.shape[1] // 2, device=keys.device)
    return places


def gathered_at(places: Tensor, values: Tensor, r: int) -> Tensor:
    """[B, L, C] -> [B, L - r, C]: sums of what goes to the same place."""
    batch, length, channels = values.shape
    sums = values.new_zeros(batch, length - r, channels)
    return sums.scatter_add(1, places[:, :, None].expand(-1, -1, channels), values)
