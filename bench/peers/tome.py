"""ToMe through its own package, where the user has it (Bolya et al., "Token Merging: Your ViT but Faster", arXiv 2210.09461)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from step_kernels.model.vit import Block

from ..engine import Contender, NotRun, in_one_line
from ..gate import Expected, Outputs
from ..options import PATCH_SIZE
from ..ratios import SPEEDUP
from ..segmenters import CLASSES, DENSE, MERGED, Segmenters, plain_upsample_argmax

# Without its requirements, among which is a timm of 2021 that returns no tokens of patches.
HOW = "pip install 'timm>=1.0.16'; pip install --no-deps git+https://github.com/facebookresearch/ToMe"


@dataclass(frozen=True)
class Plan:
    """What ToMe does: tokens merged in each block, tokens left at the end with the class token, FLOPs; all of one image."""

    merged: tuple[int, ...]
    left: int
    flops: float


def plan(segmenters: Segmenters, r: int) -> Plan:
    """ToMe's decreasing schedule: 2 r tokens in the first block, evenly less in each, none in the last; r in the mean.

    A constant r would leave a handful of tokens to the decoder where the work is that of the merged family.
    """
    vit, cells = segmenters.weights.vit, cells_of(segmenters)
    blocks, left, merged = [cast(Block, block) for block in vit.blocks], vit.num_prefix + cells, []
    flops: float = 2 * cells * vit.patch_embed.proj.weight.numel()
    for number, block in enumerate(blocks):
        asked = int(2 * r - 2 * r * number / max(1, len(blocks) - 1))
        merged.append(min(asked, (left - vit.num_prefix) // 2))  # of every second token at most
        after = left - merged[-1]
        flops += 2 * (left * weights(block.attn) + after * weights(block.mlp)) + 4 * vit.embed_dim * left**2
        if merged[-1]:  # the similarities
            flops += 2 * (left // 2) * (left - left // 2) * vit.embed_dim // block.attn.num_heads
        left = after
    return Plan(tuple(merged), left, flops + 2 * left * weights(segmenters.weights.decoder))


def cells_of(segmenters: Segmenters) -> int:
    return segmenters.size[0] * segmenters.size[1] // PATCH_SIZE**2


def weights(module: nn.Module) -> int:
    """Of the module's linear layers, biases left out."""
    return sum(one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear))


class ToMe:
    """The forward pass in ToMe's package, on the segmenters' own parameters.

    Raises:
        NotRun: the package or timm is not there, or is not what is meant by these names.
    """

    def __init__(self, segmenters: Segmenters, merged: tuple[int, ...]) -> None:
        patch, timm = packages()
        config = segmenters.weights.vit.config
        same = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
        model = timm.models.vision_transformer.VisionTransformer(
            **{name: getattr(config, name) for name in same},
            img_size=config.image_shape,
            num_classes=0,
            global_pool="",
            norm_layer=functools.partial(nn.LayerNorm, eps=config.eps),
            weight_init="skip",
        )
        model.load_state_dict(segmenters.weights.vit.state_dict(), assign=True)
        patch(model, trace_source=True)
        self._model, self._segmenters, self._merged = model.eval(), segmenters, merged
        self.note = f"timm {timm.__version__}, eager"

    @torch.no_grad()
    def decoded(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Scores [B, tokens left, classes] and sources [B, tokens left, tokens]: 1 where a token is merged into one; None where none was."""
        self._model.r = list(self._merged)
        scores = self._segmenters.weights.decoder.head(self._model(self._segmenters.inputs[number]))
        return scores, self._model._tome_info["source"]

    @torch.no_grad()
    def labels(self, number: int) -> Tensor:
        """Labels [batch, height, width] of an input: every patch has the scores of the token that it was merged into."""
        prefix, (height, width) = self._segmenters.weights.vit.num_prefix, self._segmenters.size
        scores, source = self.decoded(number)
        if source is None:
            scores = scores[:, prefix:]
        else:
            tokens = source[:, :, prefix:].argmax(1)
            scores = scores.gather(1, tokens[..., None].expand(-1, -1, scores.shape[2]))
        picture = scores.transpose(1, 2).unflatten(2, (height // PATCH_SIZE, width // PATCH_SIZE))
        return plain_upsample_argmax(picture, (height, width))


def unmerged(segmenters: Segmenters) -> Contender:
    """At r = 0: the dense model in its package's code."""
    model = ToMe(segmenters, plan(segmenters, 0).merged)
    return segmenters.contender(DENSE, model.labels, ours=False, note=model.note)


def merging(segmenters: Segmenters) -> Contender:
    """At the r whose FLOPs come closest to those of the merged family, its policy included; what can be known of it is checked."""
    goal, cells = segmenters.flops(MERGED) / segmenters.batch, cells_of(segmenters)
    r, own = min(
        ((r, plan(segmenters, r)) for r in range(1, cells // 2 + 1)), key=lambda pair: abs(pair[1].flops - goal)
    )
    model = ToMe(segmenters, own.merged)
    scores, source = model.decoded(0)
    if source is None or source.shape[1] != own.left or not ((source != 0).sum(1) == 1).all():
        raise RuntimeError(f"expected every token to be in one of {own.left} that are left")

    def view(labels: Tensor, number: int) -> Outputs:
        return (((labels >= 0) & (labels < CLASSES)).all(),)

    def everywhere(number: int) -> Outputs:
        return (torch.tensor(True, device=scores.device),)

    return Contender(
        model.labels,
        view,
        note=f"r = {r}, {own.left - segmenters.weights.vit.num_prefix} of {cells} tokens left; {model.note}",
        expected=Expected(everywhere, everywhere),
        flops=own.flops * segmenters.batch,
        facts={SPEEDUP: "computes something else"},
    )


CONTENDERS = {"ToMe, r = 0": unmerged, "ToMe, FLOPs as merged": merging}


def packages() -> tuple[Callable[..., object], Any]:
    """`tome.patch.timm` and timm; PyPI's `tome` is another package, a markup language."""
    try:
        import timm.models.vision_transformer
        from tome.patch import timm as patch  # type: ignore[import-not-found]
    except Exception as error:  # whatever a package does when it is imported beside others that do not fit
        raise NotRun(f"needs timm and ToMe's own package ({in_one_line(error)}): {HOW}") from error
    return patch, timm
