"""StepEncoder: a ViT on supertokens, with early exits (STEP, arXiv 2509.14165)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from .. import Halting, SupertokenLayout, gather_tokens
from ..checks import check_choice, check_int, describe
from ..merge import RESAMPLE
from .blocks import TAIL
from .features import DenseFeatures, FeatureLog
from .from_timm.adapter import TimmViT, check_equal_features
from .heads.exits import ExitHead
from .images import check_images, pad_to_patches, patch_grid
from .precision import without_autocast
from .sizing import Sizing
from .trace import Stage, Trace, check_layout_of
from .vit import PackedViT

__all__ = ["EncoderOutput", "StepEncoder"]


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """What `StepEncoder` returns.

    Attributes:
        tokens: [T, D]; the survivors (and prefix tokens) after the final norm.
        layout: their layout; trimmed, but for static mode.
        canvas: [B, num_classes, rows, cols], log-probabilities (ATM: mask logits) of the halted tokens in their cells. Cells of
            survivors are the decoder's to write; until then they hold nothing of use. None without exits.
        trace: the decisions taken. Those of a run under ``torch.inference_mode`` cannot be replayed in training;
            `StepSegmenter.trace`'s can.
    """

    tokens: Tensor
    layout: SupertokenLayout
    canvas: Tensor | None
    trace: Trace


class StepEncoder(DenseFeatures):
    """Runs a ViT's own parameters on merged, packed tokens and lets confident tokens leave early.

    Without policy and exits it computes what ``vit`` computes. Packed tokens are cut to the live count after the merge and
    after each exit (one host sync each), so every matmul has exactly the live size, in training too: exact mode. In static
    mode nothing is cut: every tensor keeps the rows of the unmerged grid, the ops read the live count on the device, and
    nothing waits for the host.

    Decisions carry no gradient: a policy is trained by itself, and stays in eval mode inside the encoder. ``torch.autocast``
    is ignored: the encoder computes in its parameters' dtype (``encoder.to(torch.bfloat16)`` for half precision).

    Args:
        vit: the dense model; its parameters are used as they are.
        policy: module ``policy(images, patch_size=, num_prefix=) -> SupertokenLayout``. None: every patch is a token.
        exits: {block number: head}; the head follows that block (1-based). Stored as an ``nn.ModuleDict`` whose keys are
            the numbers as strings, ascending.
        resample: how blocks of pixels and positions are pooled, ``"area"`` or ``"bilinear"`` (CTS; the same for 2x2).

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a block number outside 1..depth, a head of another width, heads that differ in classes or in what they
            write (ATM exits go with ATM exits only).
    """

    def __init__(
        self,
        vit: PackedViT,
        policy: nn.Module | None = None,
        exits: Mapping[int, ExitHead] | None = None,
        *,
        resample: str = "area",
    ) -> None:
        super().__init__()
        if not isinstance(vit, PackedViT):
            raise TypeError(f"vit: expected a ViT, got {type(vit).__name__}")
        if policy is not None and not isinstance(policy, nn.Module):
            raise TypeError(f"policy: expected an nn.Module or None, got {describe(policy)}")
        check_choice("resample", resample, RESAMPLE)
        self.vit = vit
        self.policy = policy
        self.exits = nn.ModuleDict({str(number): head for number, head in sorted(checked_exits(exits, vit).items())})
        self.resample = resample
        self.training = vit.training
        if policy is not None:
            policy.eval()

    @classmethod
    def from_timm(
        cls,
        vit: nn.Module,
        policy: nn.Module | None = None,
        exits: Mapping[int, ExitHead] | None = None,
        *,
        resample: str = "area",
        verify: bool = True,
    ) -> Self:
        """An encoder of a timm model, which is run part by part on packed tokens: no class is swapped, nothing is patched.

        Parameters stay shared with ``vit``, whose mode (training or eval) is kept. `forward_features`, `forward_intermediates`
        and `classify` return what ``vit``'s own methods (and ``vit(images)``) return, to rounding where nothing is merged.

        Args:
            vit: a ``timm.models.VisionTransformer`` or ``timm.models.Eva``, timm >= 1.0.16, with none of its parts replaced.
            policy, exits, resample: as of the class.
            verify: run ``vit`` and the encoder, without policy and exits, on one image and compare. The image is small where
                ``vit`` has ``dynamic_img_size``, else of the model's own size.

        Raises:
            NotImplementedError: a part that is not known to run on packed tokens: its path, class and why.
            RuntimeError: the features differ by more than rounding.
            TypeError, ValueError: as of the class.
        """
        parts = TimmViT(vit)
        if verify:
            check_equal_features(parts, StepEncoder(parts).forward_features)
        return cls(parts, policy, exits, resample=resample)

    @property
    def num_classes(self) -> int | None:
        """Classes of the exits; None without exits."""
        return next((head.num_classes for head in self.exit_heads().values()), None)

    def exit_heads(self) -> dict[int, ExitHead]:
        """The exits by block number (1-based), ascending."""
        return {int(number): cast(ExitHead, head) for number, head in self.exits.items()}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.policy is not None:
            self.policy.eval()
        return self

    def with_policy(self, policy: nn.Module | None) -> Self:
        """An encoder of the same modules and parameters (shared, not copied) with another policy."""
        other = copy.copy(self)
        other._modules = {name: module for name, module in self._modules.items() if name != "policy"}
        other.policy = policy
        return other

    @without_autocast
    def forward(
        self,
        images: Tensor,
        *,
        replay: Trace | None = None,
        static: bool = False,
        expected_tokens: Sequence[int] | None = None,
    ) -> EncoderOutput:
        """Encode a batch.

        Args:
            images: [B, C, H, W], normalised, in the parameters' dtype; padded with zeros to the patch size.
            replay: take these decisions instead of asking the policy and the exits (the exits' heads still run).
            static: leave layouts untrimmed, so that nothing waits for the host where the Triton kernels run (what a CUDA
                graph needs). Inference only. A replay's halted masks alone decide there; in exact mode a mask that does
                not fit its stage's layout is refused.
            expected_tokens: static mode only: about how many tokens leave the merge and each exit, as
                `Trace.token_counts` says of an earlier run. Only speed depends on it.

        Returns:
            `EncoderOutput`. With gradients enabled the canvas is differentiable, otherwise it is written in place.

        Raises:
            TypeError, ValueError: images of a wrong type, dtype, shape or device; a replay of other images or of an
                encoder with other exits; ``expected_tokens`` without ``static``, or not one for each stage.
            RuntimeError: static mode with gradients enabled.
        """
        return self._encode(images, replay, static, expected_tokens=expected_tokens)

    def _encode(
        self,
        images: Tensor,
        replay: Trace | None,
        static: bool,
        log: FeatureLog | None = None,
        *,
        expected_tokens: Sequence[int] | None = None,
    ) -> EncoderOutput:
        """`forward`, followed by ``log``."""
        log = FeatureLog() if log is None else log
        sizing = Sizing.checked(static, expected_tokens, 1 + len(self.exits))
        images = pad_to_patches(check_images(images, self.vit.embedding.weight), self.vit.patch_size)
        grid = patch_grid(images.shape[2], images.shape[3], self.vit.patch_size)
        replay = self._checked_replay(replay, images, grid, static)
        layout = sizing.settle(self._input_layout(images, grid, replay), 0)
        tokens = self.vit.packed_embedding(images, layout, self.resample)
        trace, canvas, heads = Trace(layout), None, self.exit_heads()
        inputs = self.vit.block_inputs(layout)
        for number in range(1, (log.last or self.vit.depth) + 1):
            tokens = self.vit.packed_block(number, tokens, inputs)
            log.block(number, tokens, layout)
            if number in heads:
                recorded = None if replay is None else replay.stages[len(trace.stages)]
                halting, canvas = self._exit(heads[number], tokens, layout, canvas, recorded)
                halting = sizing.settle(halting, 1 + len(trace.stages))
                check_survivors(halting, recorded)
                log.exit(tokens, layout, halting.halted)
                tokens, layout = gather_tokens(tokens, halting, tail=TAIL), halting.layout
                inputs = self.vit.block_inputs(layout, inputs)
                trace = Trace(trace.layout, (*trace.stages, Stage(number, halting.halted, layout)))
        tokens = self.vit.packed_norm(tokens, layout)
        return EncoderOutput(tokens, layout, canvas, trace)

    def _checked_replay(
        self, replay: Trace | None, images: Tensor, grid: tuple[int, int], static: bool
    ) -> Trace | None:
        """``replay`` if it fits; in static mode at full capacity."""
        if replay is None:
            return None
        if not isinstance(replay, Trace):
            raise TypeError(f"replay: expected a Trace or None, got {describe(replay)}")
        replay.check(
            batch_size=images.shape[0],
            grid=grid,
            num_prefix=self.vit.num_prefix,
            device=images.device,
            exits=tuple(self.exit_heads()),
            trimmed=not static,
        )
        return replay.untrim() if static else replay

    def _input_layout(self, images: Tensor, grid: tuple[int, int], replay: Trace | None) -> SupertokenLayout:
        """The replayed or decided layout."""
        batch_size, num_prefix = images.shape[0], self.vit.num_prefix
        if replay is not None:
            return replay.layout
        if self.policy is None:
            return SupertokenLayout.uniform(batch_size, grid, num_prefix=num_prefix, device=images.device)
        if self.policy.training:
            self.policy.eval()  # assigned after the encoder was made
        with torch.no_grad():
            layout = self.policy(images, patch_size=self.vit.patch_size, num_prefix=num_prefix)
        return check_layout_of(
            "policy's layout", layout, batch_size=batch_size, grid=grid, num_prefix=num_prefix, device=images.device
        )

    def _exit(
        self, head: ExitHead, tokens: Tensor, layout: SupertokenLayout, canvas: Tensor | None, recorded: Stage | None
    ) -> tuple[Halting, Tensor]:
        """One exit stage: the halting, and the canvas with the halted tokens written or added."""
        halted = None if recorded is None else recorded.halted
        if torch.is_grad_enabled():
            halting, written = head.halt_differentiably(tokens, layout, halted=halted)
            canvas = written if canvas is None else canvas + written
        else:
            if canvas is None:
                canvas = new_canvas(tokens, layout, head.num_classes)
            halting = head.halt(tokens, layout, canvas=canvas, halted=halted)
        return halting, canvas


def check_survivors(halting: Halting, recorded: Stage | None) -> None:
    """Refuse a recorded stage whose layout is not the one that its decisions leave. Reads shapes only."""
    if recorded is None or torch.compiler.is_compiling():  # a graph cannot branch on a count that it reads
        return
    if recorded.layout.capacity != halting.layout.capacity:
        raise ValueError(
            f"replay: expected {halting.layout.capacity} survivors of the exit after block {recorded.block}, as its "
            f"stage's halted leaves, got a layout of {recorded.layout.capacity}"
        )


def checked_exits(exits: Mapping[int, ExitHead] | None, vit: PackedViT) -> dict[int, ExitHead]:
    """``exits`` as a dict, if every head can follow its block of ``vit``."""
    if exits is None:
        return {}
    if not isinstance(exits, Mapping):
        raise TypeError(f"exits: expected a mapping from block number to exit head, got {type(exits).__name__}")
    for number, head in exits.items():
        check_int("exits' block number", number, minimum=1, maximum=vit.depth)
        if not isinstance(head, ExitHead):
            raise TypeError(f"exits[{number}]: expected an ExitHead, got {type(head).__name__}")
        if head.dim != vit.embed_dim:
            raise ValueError(f"exits[{number}]: expected a head of width {vit.embed_dim} as vit has, got {head.dim}")
    classes = {number: head.num_classes for number, head in exits.items()}
    if len(set(classes.values())) > 1:
        raise ValueError(f"exits: expected heads with one number of classes, got {classes}")
    kinds = {number: head.writes for number, head in exits.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"exits: expected heads that write one scale, all of them AtmExit or none, got {kinds}")
    return dict(exits)


def new_canvas(tokens: Tensor, layout: SupertokenLayout, num_classes: int) -> Tensor:
    """Zeros [B, num_classes, rows, cols] of the tokens' dtype; channels_last, as each token writes all its classes at once."""
    return tokens.new_zeros(layout.batch_size, *layout.grid, num_classes).permute(0, 3, 1, 2)
