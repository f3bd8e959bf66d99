"""Early exits: heads that classify every token after a block and halt the confident ones.

Sources: STEP (arXiv 2509.14165); DToP (arXiv 2308.01045) for the context tokens that ``keep_per_class`` keeps.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import Halting, SupertokenLayout, exit_head, halt_tokens, ragged_linear, scatter_back
from ...checks import check_int
from ...modules import is_plain
from ..blocks import TAIL, init_weights, packed_linear, packed_norm
from ..precision import ThresholdModule
from .canvas import LOG_PROBABILITIES, log_probabilities, new_canvas

__all__ = ["CosineExit", "ExitHead", "LinearExit"]

INITIAL_SCALE = 10.0


class ExitHead(ThresholdModule):
    """Base class of exit heads; a subclass has a norm of its own and `scores`.

    Attributes:
        activation: how the decision reads `scores`: ``"softmax"`` of class logits, or None where they are probabilities.
        writes: what the canvas receives; all exits and the decoder of a segmenter must agree.

    Args:
        dim: the tokens' width.
        num_classes: number of classes, at least 2 where ``activation`` is a softmax.
        threshold: tokens whose largest class probability is strictly above it halt: from 0 to 1, at which none does. Kept in
            the 0-dim fp32 buffer ``threshold``; ``exit.threshold = 0.9`` fills it in place.
        keep_per_class: so many of the most confident tokens of each image and class go on all the same, as context.

    Raises:
        TypeError: a size or ``keep_per_class`` is no int, or ``threshold`` no number.
        ValueError: a size, ``keep_per_class`` or ``threshold`` is out of range.
    """

    activation: ClassVar[Literal["softmax"] | None] = "softmax"
    writes: ClassVar[str] = LOG_PROBABILITIES
    settings: ClassVar[tuple[str, ...]] = ("dim", "num_classes", "threshold", "keep_per_class")
    threshold: Tensor

    def __init__(self, dim: int, num_classes: int, threshold: float = 0.95, keep_per_class: int = 0) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        least = 1 if self.activation is None else 2  # the softmax of one class is 1: every token would halt
        self.num_classes = check_int("num_classes", num_classes, minimum=least)
        self.keep_per_class = check_int("keep_per_class", keep_per_class, minimum=0)
        self.add_threshold("threshold", threshold)

    def scores(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        """Class logits [capacity, num_classes]; differentiable."""
        raise NotImplementedError

    def scores_and_values(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, Tensor]:
        """`scores` and what the canvas receives, [capacity, num_classes] each; differentiable."""
        scores = self.scores(tokens, layout)
        return scores, log_probabilities(scores)

    def halt(
        self, tokens: Tensor, layout: SupertokenLayout, *, canvas: Tensor, halted: Tensor | None = None
    ) -> Halting:
        """One exit stage for inference: decide, and write into ``canvas`` in place what this kind of exit `writes`.

        Args:
            tokens: [capacity, dim], after a block, before any final norm.
            layout: their layout.
            canvas: [B, num_classes, rows, cols].
            halted: bool [capacity]; replays a recorded decision.
        """
        scores, values = self.scores_and_values(tokens, layout)
        return self._halting(scores, layout, values=values, canvas=canvas, halted=halted)

    def halt_differentiably(
        self, tokens: Tensor, layout: SupertokenLayout, *, halted: Tensor | None = None
    ) -> tuple[Halting, Tensor]:
        """One exit stage for training: the halting, whose decision has no gradient, and what `halt` would write.

        The latter [B, num_classes, rows, cols], zero in the cells of the survivors; differentiable.
        """
        scores, values = self.scores_and_values(tokens, layout)
        halting = self._halting(scores, layout, halted=halted)
        return halting, scatter_back(values, layout, where=halting.halted)

    def _halting(self, scores: Tensor, layout: SupertokenLayout, **named: Any) -> Halting:
        return halt_tokens(
            scores, layout, self.threshold, activation=self.activation, keep_per_class=self.keep_per_class, **named
        )

    def take(
        self, tokens: Tensor, layout: SupertokenLayout, canvas: Tensor | None, halted: Tensor | None = None
    ) -> tuple[Halting, Tensor]:
        """One exit stage with what earlier ones wrote (None: this is the first): the halting, and the canvas of all.

        With gradients enabled `halt_differentiably` and a sum, else `halt`, which writes in place.
        """
        if torch.is_grad_enabled():
            halting, written = self.halt_differentiably(tokens, layout, halted=halted)
            return halting, written if canvas is None else canvas + written
        if canvas is None:
            canvas = new_canvas(tokens, layout, self.num_classes)
        return self.halt(tokens, layout, canvas=canvas, halted=halted), canvas


class LinearExit(ExitHead):
    """LayerNorm and a linear classifier; inference runs as one op, `exit_head`.

    Scores = ``F.linear(norm(tokens), head.weight, head.bias)``. Halting on their softmax follows STEP (arXiv 2509.14165).

    Arguments and errors: those of `ExitHead`.
    """

    def __init__(self, dim: int, num_classes: int, threshold: float = 0.95, keep_per_class: int = 0) -> None:
        super().__init__(dim, num_classes, threshold, keep_per_class)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.head = nn.Linear(self.dim, self.num_classes)
        init_weights(self.head)

    def scores(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        return packed_linear(self.head, packed_norm(self.norm, tokens, layout), layout)

    def halt(
        self, tokens: Tensor, layout: SupertokenLayout, *, canvas: Tensor, halted: Tensor | None = None
    ) -> Halting:
        plain = is_plain(self.norm, nn.LayerNorm) and is_plain(self.head, nn.Linear)
        if not plain or type(self).scores is not LinearExit.scores:
            return super().halt(tokens, layout, canvas=canvas, halted=halted)
        norm, head = (self.norm.weight, self.norm.bias), (self.head.weight, self.head.bias)
        named: dict[str, Any] = {"eps": self.norm.eps, "keep_per_class": self.keep_per_class}
        return exit_head(tokens, *norm, *head, layout, self.threshold, canvas=canvas, halted=halted, **named)


class CosineExit(ExitHead):
    """LayerNorm and the cosine to one learned vector per class, times a learned scale.

    Scores = ``scale * F.cosine_similarity(norm(tokens)[:, None], classes[None], dim=2)``, with ``classes`` [num_classes, dim] and the scalar
    ``scale``. Cosines to class vectors as scores follow Segmenter's decoder (arXiv 2105.05633); halting follows STEP.

    Arguments and errors: those of `ExitHead`.
    """

    def __init__(self, dim: int, num_classes: int, threshold: float = 0.95, keep_per_class: int = 0) -> None:
        super().__init__(dim, num_classes, threshold, keep_per_class)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.classes = nn.Parameter(torch.empty(self.num_classes, self.dim))
        self.scale = nn.Parameter(torch.tensor(INITIAL_SCALE))
        nn.init.trunc_normal_(self.classes, std=0.02)

    def scores(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        units = F.normalize(packed_norm(self.norm, tokens, layout), dim=1)
        return ragged_linear(units, self.scale * F.normalize(self.classes, dim=1), layout=layout, tail=TAIL)
