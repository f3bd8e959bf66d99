"""Dense features of a packed run: what timm's models return, so that heads made for them keep working."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import SupertokenLayout, scatter_back
from ..checks import check_choice, check_int, describe
from .precision import without_autocast
from .trace import Trace

if TYPE_CHECKING:
    from .encoder import StepEncoder

__all__ = ["DenseFeatures"]

OUTPUT_FORMATS = ("NCHW", "NLC")


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed tokens with their layout."""

    tokens: Tensor
    layout: SupertokenLayout
    where: Tensor | None = None  # some of them; None: all


class DenseFeatures(nn.Module):
    """The methods of `StepEncoder` that return one feature vector for every cell of the grid.

    A merged token stands in every cell that it covers. A token that halted keeps what it was when it left.
    """

    vit: Any

    embed_dim = property(lambda self: self.vit.embed_dim, doc="D, the tokens' width; timm's name, as those below.")
    num_features = property(lambda self: self.vit.embed_dim, doc="`embed_dim`.")
    num_prefix_tokens = property(lambda self: self.vit.num_prefix, doc="CLS, distillation and register tokens.")
    patch_size = property(lambda self: self.vit.patch_size, doc="Pixels per cell side.")

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each block its timm name, its channels and by how much its map is smaller than the image."""
        named = {"num_chs": self.embed_dim, "reduction": self.patch_size}
        return [{"module": f"blocks.{number}", **named} for number in range(self.vit.depth)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """A timm model's own switch: recompute blocks in the backward pass.

        Raises:
            TypeError: the model is no timm model.
        """
        self._timms("set_grad_checkpointing")(enable)

    def _timms(self, method: str, purpose: str | None = None) -> Any:
        """A method of the timm model."""
        found = getattr(getattr(self.vit, "model", None), method, None)
        if found is None:
            what = f"{purpose or method}: expected the encoder of a timm model"
            raise TypeError(f"{what}, got one of {type(self.vit).__name__}")
        return found

    @without_autocast
    def forward_features(
        self,
        x: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        replay: Trace | None = None,
        static: bool = False,
    ) -> Tensor:
        """What a timm model's ``forward_features`` returns: all tokens after the final norm, prefix tokens first.

        Args, Raises: as `forward_intermediates`.

        Returns:
            [B, num_prefix + rows * cols, D], cells in raster order. Differentiable.
        """
        refuse_masks(attn_mask, is_causal)
        depth = self.vit.depth
        return torch.cat(self._map(*self._rows_after(x, replay, static, [depth])[depth], norm=True), dim=1)

    @without_autocast
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Iterable[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        replay: Trace | None = None,
        static: bool = False,
    ) -> Any:
        """What a timm model's ``forward_intermediates`` returns, the grid restored: feature maps after some blocks.

        Args:
            x: images [B, C, H, W], as `forward` takes them.
            indices: after which blocks, 0-based (negative: from the end); an int: the last n blocks; None: all.
            return_prefix_tokens: give each map together with its prefix tokens [B, num_prefix, D].
            norm: apply the final norm to the maps.
            stop_early: run no block after the last wanted one.
            output_fmt: maps as ``"NCHW"`` [B, D, rows, cols] or ``"NLC"`` [B, rows * cols, D].
            intermediates_only: return the list of maps, not (features, list).
            output_dict: return a dictionary with timm's keys.
            attn_mask, is_causal: as timm has them; refused.
            replay, static: as in `forward`.

        Returns:
            (features as of `forward_features`, list of maps), or what the arguments above say.

        Raises:
            NotImplementedError: an attention mask, or causal attention.
            TypeError, ValueError, RuntimeError: as `forward`; indices out of range, an unknown format.
        """
        refuse_masks(attn_mask, is_causal)
        check_choice("output_fmt", output_fmt, OUTPUT_FORMATS)
        wanted = block_numbers(indices, self.vit.depth)
        last = max(wanted) if stop_early else self.vit.depth
        after = self._rows_after(x, replay, static, [*wanted, last])
        pairs = [self._map(*after[number], norm=norm) for number in sorted(set(wanted))]
        prefixes, maps = ([pair[i] for pair in pairs] for i in (0, 1))
        if output_fmt == "NCHW":
            grid = after[last][0].layout.grid
            maps = [cells.transpose(1, 2).unflatten(2, grid).contiguous() for cells in maps]
        features = None if intermediates_only else torch.cat(self._map(*after[last], norm=True), dim=1)
        with_prefixes = return_prefix_tokens and self.vit.num_prefix > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            found |= {"image_intermediates_prefix": prefixes} if with_prefixes else {}
            return found if features is None else {**found, "image_features": features}
        listed: list[Any] = list(zip(maps, prefixes, strict=True)) if with_prefixes else maps
        return listed if features is None else (features, listed)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Iterable[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: None = None,
    ) -> Any:
        """What a timm model's ``get_intermediate_layers`` returns: `forward_intermediates`, maps alone, [B, rows * cols, D] without ``reshape``."""
        rest: dict[str, Any] = {"output_fmt": "NCHW" if reshape else "NLC", "attn_mask": attn_mask}
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, intermediates_only=True, **rest)

    @without_autocast
    def hidden_states(
        self, images: Tensor, blocks: Collection[int], *, replay: Trace | None = None, static: bool = False
    ) -> dict[int, Tensor]:
        """All tokens after some blocks, the grid restored, without the final norm: {block: [B, num_prefix + rows * cols, D]}.

        Args:
            images: [B, C, H, W], as `forward` takes them.
            blocks: their numbers, 1-based; 0: what enters the first one. No block runs after the last of them.
            replay, static: as in `forward`.

        Raises:
            TypeError, ValueError, RuntimeError: as `forward`; a number out of range.
        """
        wanted = sorted({check_int("blocks", number, minimum=0, maximum=self.vit.depth) for number in blocks})
        after = self._rows_after(images, replay, static, wanted)
        return {number: torch.cat(self._map(*after[number], norm=False), dim=1) for number in wanted}

    def classify(self, images: Tensor, *, replay: Trace | None = None, static: bool = False) -> Tensor:
        """A timm model's class scores [B, num_classes]: its own pooling and head on `forward_features`.

        Raises:
            TypeError: the model has no classification head: it is no timm model.
            TypeError, ValueError, RuntimeError: as `forward`.
        """
        head = self._timms("forward_head", "classify")
        features = self.forward_features(images, replay=replay, static=static)
        with torch.autocast(features.device.type, enabled=False):
            return head(features)

    def _rows_after(
        self, images: Tensor, replay: Trace | None, static: bool, blocks: Collection[int]
    ) -> dict[int, tuple[Rows, tuple[Rows, ...]]]:
        """For each of ``blocks``, none of which runs after their last: its output, and the tokens that left before it."""
        encoder, last = cast("StepEncoder", self), max(blocks)
        now, exits = encoder.start(images, replay, static), encoder.exit_heads()
        after: dict[int, tuple[Rows, tuple[Rows, ...]]] = {0: (Rows(now.tokens, now.inputs.layout), ())}
        left: tuple[Rows, ...] = ()
        for number in range(1, last + 1):
            now.tokens = self.vit.packed_block(number, now.tokens, now.inputs)
            rows = Rows(now.tokens, now.inputs.layout)
            if number in blocks:
                after[number] = rows, left
            if number in exits and (number < last or replay is not None):  # the last moves nothing; its mask must fit
                encoder.take_exit(now, number, exits[number])
                left = (*left, replace(rows, where=now.stages[-1].halted))
        return after

    def _map(self, rows: Rows, left: Sequence[Rows], norm: bool) -> tuple[Tensor, Tensor]:
        """Prefix tokens [B, num_prefix, D] and cells [B, rows * cols, D]; those that left are in no cell of ``rows``."""
        if norm:
            rows, *left = (replace(x, tokens=self.vit.packed_norm(x.tokens, x.layout)) for x in (rows, *left))
        cells = scatter_back(rows.tokens, rows.layout)
        for part in left:
            cells = cells + scatter_back(part.tokens, part.layout, where=part.where)
        first = rows.layout.cu_seqlens[:-1, None].long()  # prefix rows are always live
        prefix = rows.tokens[first + torch.arange(rows.layout.num_prefix, device=first.device)]
        return prefix, cells.flatten(2).transpose(1, 2)


def refuse_masks(attn_mask: object, is_causal: bool) -> None:
    if attn_mask is not None:
        reason = "since packed tokens attend to their own image"
        raise NotImplementedError(f"attn_mask: expected None, {reason}, got {describe(attn_mask)}")
    if is_causal:
        raise NotImplementedError("is_causal: expected False, since packed attention is not causal, got True")


def block_numbers(indices: int | Iterable[int] | Tensor | None, depth: int) -> list[int]:
    """1-based block numbers of timm's ``indices``."""
    if indices is None:
        return list(range(1, depth + 1))
    if isinstance(indices, (Tensor, np.ndarray)):
        indices = indices.tolist()
    if isinstance(indices, (str, bytes)) or not isinstance(indices, (numbers.Integral, Iterable)):
        raise TypeError(f"indices: expected an int or a sequence of ints, got {describe(indices)}")
    if isinstance(indices, numbers.Integral):
        count = check_int("indices", indices, minimum=1, maximum=depth)
        return list(range(depth - count + 1, depth + 1))
    blocks = [check_int(f"indices[{i}]", index, minimum=-depth, maximum=depth - 1) for i, index in enumerate(indices)]
    if not blocks:
        raise ValueError("indices: expected at least one block, got none")
    return [block % depth + 1 for block in blocks]
