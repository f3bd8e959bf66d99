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
    """What ToMe does at one r.

    Attributes:
        merged: tokens that go in each block.
        left: tokens of one image after the last block, the class token included.
        flops: per image, the similarities' matmuls included.
    """

    merged: tuple[int, ...]
    left: int
    flops: float


def plan(segmenters: Segmenters, r: int) -> Plan:
    """ToMe's decreasing schedule: 2 r tokens in the first block, evenly less in each, none in the last; r in the mean.

    A constant r would leave a handful of tokens to the decoder where the work is that of the merged family.
    """
    vit = segmenters.weights.vit
    cells = segmenters.size[0] * segmenters.size[1] // PATCH_SIZE**2
    blocks, left, merged = [cast(Block, block) for block in vit.blocks], vit.num_prefix + cells, []
    flops: float = 2 * cells * vit.patch_embed.proj.weight.numel()
    for number, block in enumerate(blocks):
        asked = int(2 * r - 2 * r * number / max(1, len(blocks) - 1))
        merged.append(min(asked, (left - vit.num_prefix) // 2))  # of every second token at most
        after = left - merged[-1]
        flops += 2 * (left * weights(block.attn) + after * weights(block.mlp)) + 4 * vit.embed_dim * left**2
        if merged[-1]:
            flops += 2 * (left // 2) * (left - left // 2) * vit.embed_dim // block.attn.num_heads
        left = after
    return Plan(tuple(merged), left, flops + 2 * left * weights(segmenters.weights.decoder))


def weights(module: nn.Module) -> int:
    """Of the module's linear layers, biases left out."""
    return sum(one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear))


class ToMe:
    """The forward pass in ToMe's package, on the segmenters' own parameters, as far as the dense decoder knows merged tokens.

    Raises:
        NotRun: the package or timm is not there, or is not what is meant by these names.
    """

    def __init__(self, segmenters: Segmenters, merged: tuple[int, ...]) -> None:
        patch, timm = packages()
        config = segmenters.weights.vit.config
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=config.image_shape,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
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
    def decoded(self, number: int, *, traced: bool = False) -> Tensor:
        """Scores of an input's tokens that are left: [B, tokens left, classes], the class token's first."""
        self._model.r = list(self._merged)
        self._model._tome_info["trace_source"] = traced
        return self._segmenters.weights.decoder.head(self._model(self._segmenters.inputs[number]))

    def source(self) -> Tensor | None:
        """[B, tokens left, tokens] of the last run that was traced: 1 where a token is merged into one; None where none was."""
        return cast("Tensor | None", self._model._tome_info["source"])

    @torch.no_grad()
    def labels(self, number: int) -> Tensor:
        """Labels [batch, height, width] of an input: every patch has the scores of the token that it was merged into."""
        prefix, (height, width) = self._segmenters.weights.vit.num_prefix, self._segmenters.size
        scores, source = self.decoded(number, traced=True), self.source()
        if source is None:
            of_patches = scores[:, prefix:]
        else:
            tokens = source[:, :, prefix:].argmax(1)
            of_patches = scores.gather(1, tokens[..., None].expand(-1, -1, scores.shape[2]))
        picture = of_patches.transpose(1, 2).unflatten(2, (height // PATCH_SIZE, width // PATCH_SIZE))
        return plain_upsample_argmax(picture, (height, width))


def unmerged(segmenters: Segmenters) -> Contender:
    """At r = 0: the dense model in its package's code."""
    model = ToMe(segmenters, plan(segmenters, 0).merged)
    return segmenters.contender(DENSE, model.labels, ours=False, note=model.note)


def merging(segmenters: Segmenters) -> Contender:
    """At the r whose FLOPs come closest to those of the merged family, its policy included; what can be known of it is checked."""
    goal = segmenters.flops(MERGED) / segmenters.batch
    cells = segmenters.size[0] * segmenters.size[1] // PATCH_SIZE**2
    plans = {r: plan(segmenters, r) for r in range(1, cells // 2 + 1)}
    r = min(plans, key=lambda r: abs(plans[r].flops - goal))
    own, prefix = plans[r], segmenters.weights.vit.num_prefix
    model = ToMe(segmenters, own.merged)
    scores, source = model.decoded(0, traced=True), model.source()
    if source is None or source.shape[1] != own.left or not ((source != 0).sum(1) == 1).all():
        raise RuntimeError(f"expected every token to be in one of {own.left} that are left")

    def view(result: Tensor, number: int) -> Outputs:
        return (((result >= 0) & (result < CLASSES)).all(),)

    def everywhere(number: int) -> Outputs:
        return (torch.tensor(True, device=scores.device),)

    return Contender(
        model.labels,
        view,
        note=f"r = {r}, {own.left - prefix} of {cells} tokens left; {model.note}",
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
    if timm.__version__.startswith("0."):
        raise NotRun(f"needs timm 1.0 or newer, got {timm.__version__}: {HOW}")
    return patch, timm
