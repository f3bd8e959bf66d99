"""Decoders: from the surviving tokens to class scores, one row per supertoken.

Source: Strudel et al., "Segmenter: Transformer for Semantic Segmentation" (arXiv 2105.05633).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import SupertokenLayout, class_scores, ragged_linear, replace_prefix
from ...checks import check_int
from ..blocks import TAIL, Block, BlockInputs, init_weights, packed_block, packed_linear, packed_norm
from ..precision import without_autocast
from .canvas import LOG_PROBABILITIES, complete_canvas, log_probabilities

__all__ = ["Decoder", "LinearDecoder", "MaskTransformerDecoder", "heads_of"]


class Decoder(nn.Module):
    """Base class: ``decoder(tokens, layout)`` -> class scores and the layout that their rows belong to.

    Args:
        dim: width of the encoder's tokens.
        num_classes: number of classes.

    Attributes:
        writes: what its rows are to the canvas; the exits of a segmenter must agree (see `ExitHead`).

    Raises:
        TypeError, ValueError: a size is no int, or not positive.
    """

    writes: ClassVar[str] = LOG_PROBABILITIES

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.num_classes = check_int("num_classes", num_classes, minimum=1)

    def forward(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, SupertokenLayout]:
        """Scores of the tokens.

        Args:
            tokens: [capacity, dim], after the encoder's final norm.
            layout: their layout, trimmed or not; rows past its live count may hold anything.

        Returns:
            Logits [T', num_classes] and the layout of these T' rows, whose blocks are those of ``layout``, trimmed if that
            is; rows of prefix tokens and rows past the live count hold nothing of use. Differentiable. No host sync.
        """
        raise NotImplementedError

    def complete(self, tokens: Tensor, layout: SupertokenLayout, canvas: Tensor | None) -> Tensor:
        """The scores of every cell.

        Args:
            tokens, layout: as `forward`.
            canvas: what the exits wrote, [B, num_classes, rows, cols]; completed in place where gradients are disabled. None: no exits.

        Returns:
            [B, num_classes, rows, cols]: logits without exits, what the decoder `writes` with exits. Differentiable.
        """
        scores, layout = self(tokens, layout)
        return complete_canvas(canvas, scores if canvas is None else log_probabilities(scores), layout)


def heads_of(name: str, width: int, num_heads: int | None) -> int:
    """Attention heads for ``width`` channels, which they must divide; None: one per 64."""
    heads = max(1, width // 64) if num_heads is None else check_int("num_heads", num_heads, minimum=1)
    if width % heads:
        raise ValueError(f"{name}: expected a multiple of num_heads={heads}, got {width}")
    return heads


class LinearDecoder(Decoder):
    """One linear layer, ``head``, on the encoder's normed tokens: ``F.linear(tokens, head.weight, head.bias)``.

    Arguments and errors: those of `Decoder`. Source: the linear decoder of Segmenter (arXiv 2105.05633, section 3.2).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim, num_classes)
        self.head = nn.Linear(self.dim, self.num_classes)
        self.apply(init_weights)

    def forward(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, SupertokenLayout]:
        return packed_linear(self.head, tokens, layout), layout


class MaskTransformerDecoder(Decoder):
    """Segmenter's mask transformer: class tokens join the patches in ``depth`` blocks; scores are their cosines.

    Parameter names are Segmenter's; ``proj_patch`` and ``proj_classes`` are used as ``x @ P``; LayerNorms have eps 1e-5.
    Ignores ``torch.autocast``: computes in the dtype of its parameters.

    Args:
        dim: width of the encoder's tokens and of the decoder.
        num_classes: number of classes.
        depth: blocks.
        num_heads: attention heads. None: one per 64 channels.

    Raises:
        TypeError, ValueError: a size out of range; ``dim`` is no multiple of ``num_heads``.
    """

    eps = 1e-5

    def __init__(self, dim: int, num_classes: int, depth: int = 2, num_heads: int | None = None) -> None:
        super().__init__(dim, num_classes)
        dim, num_classes = self.dim, self.num_classes
        self.depth, self.num_heads = check_int("depth", depth, minimum=0), heads_of("dim", dim, num_heads)
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, dim))
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, self.num_heads, eps=self.eps) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=self.eps)
        self.mask_norm = nn.LayerNorm(num_classes, eps=self.eps)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)
        self.apply(init_weights)

    @without_autocast
    def forward(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, SupertokenLayout]:
        tokens = packed_linear(self.proj_dec, tokens, layout)
        tokens, layout = replace_prefix(tokens, layout, self.cls_emb[0], tail=TAIL)
        inputs = BlockInputs(layout)
        for number, block in enumerate(cast(Iterable[Block], self.blocks)):
            tokens = packed_block(block, tokens, inputs, f"decoder.blocks.{number}")
        tokens = packed_norm(self.decoder_norm, tokens, layout)
        class_rows = layout.cu_seqlens[:-1, None].long() + torch.arange(self.num_classes, device=layout.device)
        classes = F.normalize(tokens[class_rows] @ self.proj_classes, dim=-1)  # [B, C, D]; these rows are always live
        patches, layout = replace_prefix(tokens, layout, tokens.new_empty(0, self.dim), tail=TAIL)
        projection = self.proj_patch.t().contiguous()  # x @ P is a linear layer of weight P.t(), in rows
        patches = ragged_linear(patches, projection, layout=layout, tail=TAIL)
        # Over the capacity, tail included: no row meets another, so what a tail holds stays there.
        patches = F.normalize(patches, dim=-1)
        masks = class_scores(classes, patches, layout, tail=TAIL)
        return packed_norm(self.mask_norm, masks, layout), layout
