"""StepEncoder: a ViT on supertokens, with early exits (STEP, arXiv 2509.14165)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, cast

import torch
from torch import Tensor, nn

from .. import SupertokenLayout, gather_tokens
from ..checks import check_choice, check_int, describe
from ..merge import RESAMPLE, Resample
from ..modules import check_uncalled
from .blocks import TAIL, BlockInputs
from .features import DenseFeatures
from .from_timm.adapter import TimmViT, check_equal_features
from .from_transformers.adapter import TransformersViT
from .from_transformers.outputs import TransformersModel, check_equal_outputs
from .heads.exits import ExitHead
from .info import CheckpointInfo
from .precision import without_autocast
from .run import Run
from .trace import Batch, Stage, Trace
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


@dataclass(eq=False)
class Pass:
    """A forward pass under way, between two blocks."""

    run: Run
    tokens: Tensor  # [capacity, D]
    inputs: BlockInputs  # with the layout of this stage
    merged: SupertokenLayout  # the layout after the merge
    canvas: Tensor | None = None  # what the exits have written; None before the first one
    stages: list[Stage] = field(default_factory=list)


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

    info = CheckpointInfo("none")  # of the file that it was loaded from

    def __init__(
        self,
        vit: PackedViT,
        policy: nn.Module | None = None,
        exits: Mapping[int, ExitHead] | None = None,
        *,
        resample: Resample = "area",
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
        resample: Resample = "area",
        position_rule: str = "bicubic",
        verify: bool = True,
    ) -> Self:
        """An encoder of a timm model, which is run part by part on packed tokens: no class is swapped, nothing is patched.

        Parameters stay shared with ``vit``, whose mode (training or eval) is kept. `forward_features`, `forward_intermediates`
        and `classify` return what ``vit``'s own methods (and ``vit(images)``) return, to rounding where nothing is merged.

        Args:
            vit: a ``timm.models.VisionTransformer`` or ``timm.models.Eva``, timm >= 1.0.17, with none of its parts replaced.
            policy, exits, resample: as of the class.
            position_rule: how position embeddings are resized: ``"bicubic"`` as by timm; a rule of `resize_positions`.
            verify: run ``vit`` and the encoder, without policy and exits, on one image and compare. The image is small where
                ``vit`` has ``dynamic_img_size``, else of the model's own size.

        Raises:
            NotImplementedError: a part that is not known to run on packed tokens: its path, class and why. Also from each run.
            RuntimeError: the features differ by more than rounding.
            TypeError, ValueError: as of the class.
        """
        parts = TimmViT(vit, position_rule)
        if verify:
            check_equal_features(parts, StepEncoder(parts).forward_features)
        return cls(parts, policy, exits, resample=resample)

    @classmethod
    def from_transformers(
        cls,
        model: nn.Module,
        policy: nn.Module | None = None,
        exits: Mapping[int, ExitHead] | None = None,
        *,
        resample: Resample = "area",
        verify: bool = True,
    ) -> Self:
        """As `from_timm`, an encoder of a vision transformer of Hugging Face transformers >= 5.0; `as_transformers` is called like ``model``.

        Args:
            model: ViT, DINOv2 (with registers), DINOv3, CLIP, SigLIP, SigLIP 2: the model or its backbone, none of its parts replaced; or
                an EoMT, whose blocks before the queries enter are the encoder's.
            policy, exits, resample, verify, Raises: as of `from_timm`.
        """
        parts = TransformersViT(model)
        if verify:
            check_equal_outputs(StepEncoder(parts))
        return cls(parts, policy, exits, resample=resample)

    def as_transformers(self) -> TransformersModel:
        """A module for the place of the transformers model that this encoder was made of (TypeError: of another one), such as the ``backbone``
        of a DPT, Depth Anything, UperNet or Mask2Former: with that model's arguments, output classes and shapes."""
        return TransformersModel(self)

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
            expected_tokens: for static mode only: about how many tokens leave the merge and each exit, as
                `Trace.token_counts` of an earlier run. Only speed depends on it.

        Returns:
            `EncoderOutput`. With gradients enabled the canvas is differentiable, otherwise it is written in place.

        Raises:
            TypeError, ValueError: images of a wrong type, dtype, shape or device; a replay of other images or of an
                encoder with other exits.
            RuntimeError: static mode with gradients enabled; under ``torch.jit.trace``.
        """
        now = self.start(images, replay, static, expected_tokens)
        exits = self.exit_heads()
        for number in range(1, self.vit.depth + 1):
            now.tokens = self.vit.packed_block(number, now.tokens, now.inputs)
            if number in exits:
                self.take_exit(now, number, exits[number])
        layout = now.inputs.layout
        tokens = self.vit.packed_norm(now.tokens, layout)
        return EncoderOutput(tokens, layout, now.canvas, Trace(now.merged, tuple(now.stages)))

    def start(
        self,
        images: Tensor,
        replay: Trace | None = None,
        static: bool = False,
        expected_tokens: Sequence[int] | None = None,
    ) -> Pass:
        """The pass before its first block: merged and embedded. Arguments and errors: those of `forward`."""
        exits = self.exit_heads()
        for path, module in (("vit", self.vit), *((f"exits.{number}", head) for number, head in exits.items())):
            check_uncalled(path, module)
        checked_exits(exits, self.vit)  # blocks may have been cut off since
        pixels, grid = self.vit.on_grid(images)
        batch = Batch(pixels.shape[0], grid, self.vit.num_prefix, pixels.device)
        run = Run.checked(pixels, batch, tuple(exits), replay, static, expected_tokens)
        layout = run.settle(self._input_layout(run), 0)
        tokens = self.vit.packed_embedding(pixels, layout, self.resample)
        return Pass(run, tokens, self.vit.block_inputs(layout), layout)

    def take_exit(self, now: Pass, number: int, head: ExitHead) -> None:
        """``head`` after block ``number``; what survives goes on."""
        stage, layout = len(now.stages), now.inputs.layout
        recorded = None if now.run.replay is None else now.run.replay.stages[stage]
        halting, now.canvas = head.take(now.tokens, layout, now.canvas, None if recorded is None else recorded.halted)
        halting = now.run.settle(halting, 1 + stage)
        if recorded is not None and not torch.compiler.is_compiling():  # a graph cannot branch on a count that it reads
            left, told = halting.layout.capacity, recorded.layout.capacity
            if left != told:
                wanted = f"{left} survivors of the exit after block {number}, as its stage's halted leaves"
                raise ValueError(f"replay: expected {wanted}, got a layout of {told}")
        now.tokens = gather_tokens(now.tokens, halting, tail=TAIL)
        now.inputs = self.vit.block_inputs(halting.layout, now.inputs)
        decided = halting.halted, halting.layout, halting.confidence, halting.labels
        now.stages.append(Stage(number, *decided))

    def _input_layout(self, run: Run) -> SupertokenLayout:
        """The replayed or decided layout."""
        if run.replay is not None:
            return run.replay.layout
        if self.policy is None:
            size, grid, num_prefix, device = run.batch
            return SupertokenLayout.uniform(size, grid, num_prefix=num_prefix, device=device)
        if self.policy.training:
            self.policy.eval()  # assigned after the encoder was made
        with torch.no_grad():
            layout = self.policy(run.pixels, patch_size=self.vit.patch_size, num_prefix=self.vit.num_prefix)
        return run.batch.check("policy's layout", layout)


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
    alike = {"num_classes": "with one number of classes", "writes": "that write one scale, all of them AtmExit or none"}
    for name, what in alike.items():
        found = {number: getattr(head, name) for number, head in exits.items()}
        if len(set(found.values())) > 1:
            raise ValueError(f"exits: expected heads {what}, got {found}")
    return dict(exits)
