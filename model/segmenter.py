"""StepSegmenter: encoder, exits and decoder to a map of class scores, or to labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .. import upsample_argmax
from .encoder import StepEncoder
from .heads.decoders import Decoder
from .info import CheckpointInfo
from .precision import without_autocast
from .trace import Trace

if TYPE_CHECKING:
    from .graph.capture import CapturedSegmenter

__all__ = ["StepSegmenter"]


class StepSegmenter(nn.Module):
    """Semantic segmentation with merged tokens and early exits.

    The decoder sees the survivors and writes the cells they cover; the exits have written the others. With exits both write log-probabilities, so
    that no two scales meet when the map is upsampled; ATM exits and an `AtmDecoder` both write mask logits, to which the decoder's class weights
    apply at the end. ``torch.autocast`` is ignored: the segmenter computes in its parameters' dtype.

    Source: STEP (arXiv 2509.14165).

    Args:
        encoder: its exits, if any, must have the decoder's classes.
        decoder: a decoder of the encoder's width.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: decoder and encoder differ in width or in classes, or an `AtmDecoder` meets other exits than ATM's.
    """

    info = CheckpointInfo("none")  # of the file that it was loaded from

    def __init__(self, encoder: StepEncoder, decoder: Decoder) -> None:
        super().__init__()
        if not isinstance(encoder, StepEncoder):
            raise TypeError(f"encoder: expected a StepEncoder, got {type(encoder).__name__}")
        if not isinstance(decoder, Decoder):
            raise TypeError(f"decoder: expected a Decoder, got {type(decoder).__name__}")
        if decoder.dim != encoder.vit.embed_dim:
            raise ValueError(f"decoder: expected width {encoder.vit.embed_dim} as the encoder has, got {decoder.dim}")
        if encoder.num_classes not in (None, decoder.num_classes):
            raise ValueError(
                f"decoder: expected {encoder.num_classes} classes as the exits have, got {decoder.num_classes}"
            )
        for number, head in encoder.exit_heads().items():
            if head.writes != decoder.writes:
                raise ValueError(
                    f"decoder: expected one that writes {head.writes} as exits[{number}], {type(head).__name__}, does, "
                    f"got {type(decoder).__name__}, which writes {decoder.writes}"
                )
        self.encoder = encoder
        self.decoder = decoder

    @property
    def num_classes(self) -> int:
        return self.decoder.num_classes

    def forward(self, images: Tensor, replay: Trace | None = None, *, static: bool = False) -> Tensor:
        """Class scores on the patch grid.

        Args:
            images: [B, C, H, W], normalised, in the parameters' dtype; padded with zeros to the patch size.
            replay: decisions to repeat, from `trace`.
            static: as in `StepEncoder.forward`.

        Returns:
            [B, num_classes, rows, cols] of the padded image's grid: logits without exits, log-probabilities with exits; with an `AtmDecoder` its
            predictions, each between 0 and 1, in fp32 or wider, with exits and without. Differentiable when gradients are enabled.

        Raises:
            TypeError, ValueError: as `StepEncoder.forward`.
        """
        return self.run(images, replay, static=static)[0]

    def predict(self, images: Tensor, replay: Trace | None = None, *, static: bool = False) -> Tensor:
        """Labels at image size: bilinear upsampling of the scores and argmax.

        Of an image that is no multiple of the patch size the padded image's labels are cut, or, if ``self.info.stretch``, the scores are
        stretched over the image, as mmsegmentation does.

        Args, Raises: as `forward`.

        Returns:
            Class numbers [B, H, W], contiguous: uint8 up to 256 classes, else int32. No gradient.
        """
        return self.decide_and_predict(images, replay, static=static)[0]

    @torch.no_grad()
    def decide_and_predict(
        self,
        images: Tensor,
        replay: Trace | None = None,
        *,
        static: bool = False,
        expected_tokens: Sequence[int] | None = None,
    ) -> tuple[Tensor, Trace]:
        """`predict` with the decisions behind its labels, from one run. Arguments: those of `StepEncoder.forward`."""
        scores, trace = self.run(images, replay, static=static, expected_tokens=expected_tokens)
        return self.labels(scores, (images.shape[2], images.shape[3])), trace

    def labels(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Class numbers [B, height, width] of images of that size, of `forward`'s scores on their padded grid."""
        patch_size, (height, width) = self.encoder.vit.patch_size, size
        # A grid that does not reach the picture's end is stretched over it.
        whole = max(height, scores.shape[2] * patch_size), max(width, scores.shape[3] * patch_size)
        labels = upsample_argmax(scores, size if self.info.stretch else whole)
        if labels.shape[1:] != size:
            # A view would keep the padded labels alive.
            labels = labels[:, :height, :width].clone(memory_format=torch.contiguous_format)
        return labels

    @without_autocast
    def run(self, images: Tensor, replay: Trace | None = None, **named: Any) -> tuple[Tensor, Trace]:
        """What `forward` returns, and the decisions behind it. Arguments: those of `StepEncoder.forward`."""
        encoded = self.encoder(images, replay=replay, **named)
        return self.decoder.complete(encoded.tokens, encoded.layout, encoded.canvas), encoded.trace

    def capture(self, images: Tensor, replay: Trace | None = None) -> CapturedSegmenter:
        """`predict` as one CUDA graph, replayable on up to B images of this size with other token counts.

        ``images``: [B, C, H, W], normalised, in the parameters' dtype, on their CUDA device; as typical as can be. ``replay`` and errors: as of
        `CapturedSegmenter`.
        """
        from .graph.capture import CapturedSegmenter  # it takes a segmenter apart: above this file

        return CapturedSegmenter(self, images, replay)

    def with_policy(self, policy: nn.Module | None) -> Self:
        """A segmenter of the same modules and parameters (shared, not copied) with another policy."""
        other = copy.copy(self)
        other._modules = {**self._modules, "encoder": self.encoder.with_policy(policy)}
        return other

    def trace(self, images: Tensor) -> Trace:
        """The decisions of a free run on ``images``, to replay, in inference or in training.

        Args:
            images: [B, C, H, W], normalised, in the parameters' dtype.

        Returns:
            `Trace`, of ordinary tensors also under ``torch.inference_mode``, whose own tensors autograd refuses.

        Raises:
            TypeError, ValueError: as `StepEncoder.forward`.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self.encoder(images).trace
