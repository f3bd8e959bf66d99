"""ToMe through its own package, where the user has it (Bolya et al., "Token Merging: Your ViT but Faster", arXiv 2210.09461).

ToMe merges the tokens of every block by their similarity. It cannot repeat recorded decisions, so no label of it can be held to an
oracle. What is right can be checked at r = 0 alone, where it merges nothing: that row is gated like any other. At the r whose work
comes closest to that of the merged family it is timed beside the others, checked for what can be checked, and its time stands in a
note, without any speed-up: it computes something else.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from step_kernels.model.vit import Block

from ..kernels.contenders import in_one_line
from ..kernels.operation import Unavailable
from ..kernels.plain import upsample_argmax
from ..model import gate
from ..model.case import MERGED, Case
from ..model.registry import Built
from ..report import _number
from ..timing import Timings

# Without its requirements, among which is a timm of 2021 that returns no tokens of patches.
HOW = "pip install 'timm>=1.0.16'; pip install --no-deps git+https://github.com/facebookresearch/ToMe"
KEPT = ("tome", 0)  # in `Weights.kept`
LABELS, TOKENS = "ToMe, labels", "ToMe, tokens"  # what is timed at r > 0


@dataclass(frozen=True)
class Plan:
    """What ToMe does at one r.

    Attributes:
        merged: tokens that go in each block.
        lengths: tokens of one image, the class token included, at the input of each block and after the last one.
        gigaflops: per image, counted as for all rows, the similarities' matmuls included.
    """

    merged: tuple[int, ...]
    lengths: tuple[int, ...]
    gigaflops: float


def plan(case: Case, r: int) -> Plan:
    """ToMe's decreasing schedule: 2 r tokens in the first block, evenly less in each, none in the last; r in the mean.

    A constant r would leave a handful of tokens to the decoder where the work is that of the merged family.
    """
    vit, cells = case.weights.vit, case.grid[0] * case.grid[1]
    blocks = [cast(Block, block) for block in vit.blocks]
    merged, lengths, flops = [], [vit.num_prefix + cells], vit.embedding_flops(cells)
    for number, block in enumerate(blocks):
        before = lengths[-1]
        asked = int(2 * r - 2 * r * number / max(1, len(blocks) - 1))
        merged.append(min(asked, (before - vit.num_prefix) // 2))  # of every second token at most
        after = before - merged[-1]
        linears = before * _weights(block.attn) + after * _weights(block.mlp)
        flops += 2 * linears + 4 * vit.embed_dim * before**2
        if merged[-1]:
            flops += 2 * (before // 2) * (before - before // 2) * vit.embed_dim // block.attn.num_heads
        lengths.append(after)
    flops += case.weights.decoder.flops([lengths[-1]], num_prefix=vit.num_prefix)
    return Plan(tuple(merged), tuple(lengths), flops / 1e9)


def plan_like_merged(case: Case) -> tuple[int, Plan]:
    """The r >= 1 whose GFLOPs come closest to those of the merged family, its policy included."""
    cells = case.grid[0] * case.grid[1]
    plans = {r: plan(case, r) for r in range(1, cells // 2 + 1)}
    goal = case.gigaflops(MERGED)
    best = min(plans, key=lambda r: abs(plans[r].gigaflops - goal))
    return best, plans[best]


class PatchedViT:
    """The dense model of a case as timm's ViT, on the case's own parameters, patched by ToMe's package.

    Raises:
        Unavailable: the package or timm is not there, or is not what is meant by these names.
    """

    def __init__(self, case: Case) -> None:
        patch, timm = _packages()
        config = case.weights.vit.config
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
        model.load_state_dict(case.weights.vit.state_dict(), assign=True)
        patch(model, trace_source=True)
        self._model, self.variant = model.eval(), f"timm {timm.__version__}, eager"

    def tokens(self, images: Tensor, merged: tuple[int, ...], *, traced: bool) -> Tensor:
        """[B, tokens left, D] after the final norm, the class token first."""
        self._model.r = list(merged)
        self._model._tome_info["trace_source"] = traced
        return cast(Tensor, self._model(images))

    def source(self) -> Tensor | None:
        """[B, tokens left, tokens] of the last run that was traced: 1 where a token is merged into one; None where none was."""
        return cast("Tensor | None", self._model._tome_info["source"])


def patched(case: Case) -> PatchedViT:
    """Built once for all comparisons of a model at one size."""
    if KEPT not in case.weights.kept:
        case.weights.kept[KEPT] = PatchedViT(case)
    return cast(PatchedViT, case.weights.kept[KEPT])


class ToMe:
    """The forward pass: images -> class scores and labels, as far as the dense decoder knows merged tokens."""

    def __init__(self, case: Case, merged: tuple[int, ...]) -> None:
        self._case, self._merged, self._model = case, merged, patched(case)
        self.variant = self._model.variant

    @torch.no_grad()
    def decoded(self, number: int, *, traced: bool = False) -> Tensor:
        """Scores of an input's tokens that are left: [B, tokens left, classes], class token included."""
        tokens = self._model.tokens(self._case.inputs[number], self._merged, traced=traced)
        return self._case.weights.decoder.head(tokens)

    @torch.no_grad()
    def scores(self, number: int) -> Tensor:
        """Class scores [B, classes, rows, cols] of an input: every patch has those of the token that it was merged into."""
        prefix = self._case.weights.vit.num_prefix
        scores, source = self.decoded(number, traced=True), self._model.source()
        if source is None:
            of_patches = scores[:, prefix:]
        else:
            tokens = source[:, :, prefix:].argmax(1)
            of_patches = scores.gather(1, tokens[..., None].expand(-1, -1, scores.shape[2]))
        return of_patches.transpose(1, 2).unflatten(2, self._case.grid)

    def labels(self, number: int) -> Tensor:
        """Labels [B, size, size] of an input."""
        return upsample_argmax(self.scores(number), (self._case.size, self._case.size))

    def check(self, left: int) -> None:
        """What can be known of r > 0: as many tokens as planned, each patch in one of them, finite scores that follow the images.

        Raises:
            RuntimeError: one of them is not so.
        """
        last = len(self._case.inputs) - 1
        scores, source = self.decoded(last, traced=True), self._model.source()
        if source is None or source.shape[1] != left:
            raise RuntimeError(f"expected {left} tokens to be left, got {None if source is None else source.shape[1]}")
        if not ((source != 0).sum(1) == 1).all():
            raise RuntimeError("expected every token to be in one of those that are left")
        if not scores.isfinite().all():
            raise RuntimeError("expected finite scores")
        with gate.turned_over(self._case):
            if torch.equal(self.decoded(last), scores):
                raise RuntimeError("expected other scores for other images in the same memory")


def unmerged(case: Case) -> Built:
    """Builder of ToMe at r = 0: the dense model in its package's code."""
    model = ToMe(case, plan(case, 0).merged)
    return Built(model.labels, model.scores, variant=model.variant)


class Beside:
    """ToMe at r > 0, timed in the rounds of the others and told in a note.

    Args:
        case: where `unmerged` is right.
    """

    def __init__(self, case: Case) -> None:
        self._case, self._problem = case, ""
        self._r, self._plan = plan_like_merged(case)
        self.contenders: Mapping[str, Built] = {}
        try:
            model = ToMe(case, self._plan.merged)
            model.check(self._plan.lengths[-1])
            self.contenders = {
                LABELS: Built(model.labels, model.scores),
                TOKENS: Built(model.decoded, model.decoded),
            }
        except Exception as error:  # no memory for it, say; the others are still to be timed
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Goes without a time for what it raised, or for what that was the wrapping of."""
        cause = error.__cause__
        self.contenders, self._problem = {}, in_one_line(cause if isinstance(cause, Exception) else error)

    def note(self, timings: Mapping[str, Timings]) -> str:
        """What a reader may know of it."""
        case, prefix = self._case, self._case.weights.vit.num_prefix
        at = f"ViT {case.weights.name}, {case.size} px, batch {case.batch}, {case.kind} layouts"
        which = (
            f"beside it in the same rounds, ToMe at r = {self._r} ({at}; 2 r tokens go in the first block, none in the last: its "
            "decreasing schedule)"
        )
        if self._problem:
            return f"{which}: not timed: {self._problem}"
        left, cells = self._plan.lengths[-1] - prefix, self._plan.lengths[0] - prefix
        labels, tokens = (self._time(timings[name]) for name in (LABELS, TOKENS))
        return (
            f"{which}: {_number(self._plan.gigaflops)} GFLOPs/image, as close as can be to the merged family's "
            f"{_number(case.gigaflops(MERGED))}; {left} of {cells} tokens left; {labels}; without tracing tokens to patches and without "
            f"labels {tokens}. It merges by similarity, so it computes something else by design: nothing can hold its labels to the "
            "oracle's, and no speed-up is stated"
        )

    def _time(self, timing: Timings) -> str:
        spread = f"{_number(timing.p20)} - {_number(timing.p80)}"
        return (
            f"{_number(timing.median)} ms/batch ({spread}), {_number(self._case.batch * 1000 / timing.median)} images/s"
        )


def _weights(module: nn.Module) -> int:
    """Of the module's linear layers, biases left out."""
    return sum(one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear))


def _packages() -> tuple[Callable[..., object], Any]:
    """`tome.patch.timm` and timm; PyPI's `tome` is another package, a markup language."""
    try:
        patch: Callable[..., object] = importlib.import_module("tome.patch").timm
        timm: Any = importlib.import_module("timm")
        importlib.import_module("timm.models.vision_transformer")
    except Exception as error:  # whatever a package does when it is imported beside others that do not fit
        raise Unavailable(f"needs timm and ToMe's own package ({in_one_line(error)}): {HOW}") from error
    if timm.__version__.startswith("0."):
        raise Unavailable(f"needs timm 1.0 or newer, got {timm.__version__}: {HOW}")
    return patch, timm
