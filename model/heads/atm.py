"""Attention-to-mask (ATM) exits and decoder: class queries attend to the tokens, and their scores are the masks.

Sources: SegViT (arXiv 2210.05844) for attention to mask; DToP (arXiv 2308.01045) for exits made of it. A reconstruction of
DToP's head: its parameters, names and order of steps, but no dropout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import SupertokenLayout, class_attention
from ...checks import check_int
from ...modules import check_uncalled
from ...numerics import accumulator
from ..blocks import TAIL, init_weights, packed_linear, packed_norm
from ..precision import without_autocast
from .canvas import MASK_LOGITS, complete_canvas
from .decoders import Decoder, heads_of
from .exits import ExitHead

__all__ = ["AtmDecoder", "AtmExit"]


class CrossAttention(nn.Module):
    """Queries to tokens, with the parameters of an attention whose q, k and v are linear layers of their own."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, queries: Tensor, tokens: Tensor, layout: SupertokenLayout, masks: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[1 or B, C, W] against [capacity, W] -> [B, C, W]; with ``masks`` also the scores [capacity, C], mean over heads."""
        heads = (self.num_heads, self.q.out_features // self.num_heads)
        q = self.q(queries).unflatten(2, heads).expand(layout.batch_size, -1, -1, -1)
        k, v = (packed_linear(linear, tokens, layout).unflatten(1, heads) for linear in (self.k, self.v))
        found = class_attention(q, k, v, layout, return_scores=masks, tail=TAIL)
        mixed, scores = found if isinstance(found, tuple) else (found, None)
        return self.proj(mixed.flatten(2)), scores


class AtmLayer(nn.Module):
    """Post-norm decoder layer: self-attention of the queries, attention to the tokens, MLP with ReLU."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.multihead_attn = CrossAttention(width, num_heads)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, queries: Tensor, tokens: Tensor, layout: SupertokenLayout, masks: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `CrossAttention.forward`."""
        queries = self.norm1(queries + self_attention(self.self_attn, queries))
        attended, scores = self.multihead_attn(queries, tokens, layout, masks)
        queries = self.norm2(queries + attended)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries)))), scores


def self_attention(attn: nn.MultiheadAttention, queries: Tensor) -> Tensor:
    """``attn(queries, queries, queries)`` in plain ops: in inference the module takes a fused path, which counts no FLOPs."""
    check_uncalled("self_attn", attn)
    qkv = F.linear(queries, cast(Tensor, attn.in_proj_weight), attn.in_proj_bias)
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return attn.out_proj(mixed.transpose(1, 2).flatten(2))


class AtmHead(nn.Module):
    """What exit and decoder share: tokens to mask logits of every token, and class logits of every image.

    ``input_proj``, ``proj_norm``, ``q`` (one query per class), ``decoder.layers`` and ``class_embed`` are named as DToP's. The
    second of a class's two logits says that the class is absent.
    """

    def __init__(self, dim: int, num_classes: int, depth: int, num_heads: int | None, width: int | None) -> None:
        super().__init__()
        depth = check_int("depth", depth, minimum=1)
        width = max(1, dim // 2) if width is None else check_int("width", width, minimum=1)
        num_heads = heads_of("width", width, num_heads)
        self.sizes = depth, num_heads, width
        self.input_proj = nn.Linear(dim, width)
        self.proj_norm = nn.LayerNorm(width)
        self.q = nn.Embedding(num_classes, width)
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(AtmLayer(width, num_heads) for _ in range(depth))})
        self.class_embed = nn.Linear(width, 2)
        self.apply(init_weights)

    @without_autocast
    def forward(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, Tensor]:
        """Mask logits [capacity, num_classes] (rows past the live count: undefined) and class logits [B, num_classes, 2]."""
        tokens = packed_norm(self.proj_norm, packed_linear(self.input_proj, tokens, layout), layout)
        # All images share them until they have seen the tokens. Detached without a gradient to be had: PyTorch's FLOP counter
        # stumbles over a module whose input is a view of a parameter.
        queries, masks = (self.q.weight if torch.is_grad_enabled() else self.q.weight.detach())[None], None
        layers = list(cast(Iterable[AtmLayer], self.decoder["layers"]))
        for layer in layers:
            queries, masks = layer(queries, tokens, layout, masks=layer is layers[-1])
        return cast(Tensor, masks), self.class_embed(queries)


def class_weights(class_logits: Tensor) -> Tensor:
    """Probability that each class is present: [B, C] in fp32 or wider."""
    return class_logits.softmax(2, dtype=accumulator(class_logits.dtype))[..., 0]


def predictions(weights: Tensor, masks: Tensor) -> Tensor:
    """Class weight times sigmoid of the mask logit, in fp32 or wider: near 1, fp16 and bf16 would make ties."""
    return weights * masks.to(weights.dtype).sigmoid()


def token_predictions(masks: Tensor, class_logits: Tensor, layout: SupertokenLayout) -> Tensor:
    """Of each token with its own image's weights: [capacity, C]."""
    return predictions(class_weights(class_logits).index_select(0, layout.cells[:, 0]), masks)


class AtmExit(ExitHead):
    """DToP's exit: class queries attend to the tokens; prediction = class weight x sigmoid(mask logit).

    ``depth`` decoder layers; mask logits are the last one's attention scores before the softmax, averaged over heads; the confidence is a token's
    largest prediction. The canvas receives the mask logits alone: the class weights that count are those of the `AtmDecoder` at the end, so this
    exit goes with that decoder and no other kind of exit. Class queries attend to prefix tokens too, which are never classified. In training the
    segmenter's map reaches this exit through its masks only: train its class weights by a loss on `masks_and_classes`, as DToP trains every stage.

    Source: DToP (arXiv 2308.01045), whose head this is, dropout left out.

    Args:
        dim, num_classes, keep_per_class: as `ExitHead`.
        threshold: tokens whose largest prediction is strictly above it halt.
        depth: decoder layers.
        num_heads: attention heads. None: one per 64 channels of ``width``.
        width: of queries and projected tokens. None: half of ``dim``.

    Raises:
        TypeError, ValueError: as `ExitHead`; ``width`` is no multiple of ``num_heads``.
    """

    activation = None
    writes = MASK_LOGITS
    settings = (*ExitHead.settings, "depth", "num_heads", "width")

    def __init__(
        self,
        dim: int,
        num_classes: int,
        threshold: float = 0.95,
        keep_per_class: int = 5,
        *,
        depth: int = 3,
        num_heads: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__(dim, num_classes, threshold, keep_per_class)
        self.head = AtmHead(self.dim, self.num_classes, depth, num_heads, width)
        self.depth, self.num_heads, self.width = self.head.sizes

    def masks_and_classes(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, Tensor]:
        """What a loss on this exit is made of.

        Args:
            tokens: [capacity, dim], after a block.
            layout: their layout.

        Returns:
            Mask logits [capacity, num_classes], rows past the live count undefined, and class logits [B, num_classes, 2], of
            which the first says that the class is present. Differentiable.
        """
        return self.head(tokens, layout)

    def scores(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        """Predictions [capacity, num_classes], each between 0 and 1, in fp32 or wider."""
        return self.scores_and_values(tokens, layout)[0]

    def scores_and_values(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, Tensor]:
        masks, class_logits = self.head(tokens, layout)
        return token_predictions(masks, class_logits, layout), masks


class AtmDecoder(Decoder):
    """The last stage of a segmenter with ATM exits, or DToP's head on an encoder without exits.

    The same head as `AtmExit`. Its class weights apply to the whole map, the cells of tokens that halted earlier included:
    prediction = class weight x sigmoid(mask logit), per cell. As in DToP the predictions, not the masks, are upsampled to
    image size. The head reads the tokens behind the encoder's final norm; DToP's ViT has none (``final_norm=False``).

    Source: DToP (arXiv 2308.01045), dropout left out.

    Args:
        dim, num_classes: as `Decoder`.
        depth, num_heads, width: as `AtmExit`.

    Raises:
        TypeError, ValueError: a size out of range; ``width`` is no multiple of ``num_heads``.
    """

    writes = MASK_LOGITS

    def __init__(
        self, dim: int, num_classes: int, *, depth: int = 3, num_heads: int | None = None, width: int | None = None
    ) -> None:
        super().__init__(dim, num_classes)
        self.head = AtmHead(self.dim, self.num_classes, depth, num_heads, width)
        self.depth, self.num_heads, self.width = self.head.sizes

    def forward(self, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, SupertokenLayout]:
        """Predictions [capacity, num_classes], in fp32 or wider, and ``layout``; as `Decoder.forward` otherwise."""
        masks, class_logits = self.head(tokens, layout)
        return token_predictions(masks, class_logits, layout), layout

    def complete(self, tokens: Tensor, layout: SupertokenLayout, canvas: Tensor | None) -> Tensor:
        """The predictions of every cell, in fp32 or wider, with exits and without; as `Decoder.complete` otherwise."""
        check_uncalled("decoder", self)
        masks, class_logits = self.head(tokens, layout)
        return predictions(class_weights(class_logits)[:, :, None, None], complete_canvas(canvas, masks, layout))
