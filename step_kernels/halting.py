"""Early exits: which tokens halt, where their predictions go, and who survives (STEP, arXiv 2509.14165; DToP, arXiv 2308.01045)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks
from .checks import (
    Tail,
    check_choice,
    check_device,
    check_int,
    check_no_grad,
    check_number,
    check_optional,
    check_tail,
    check_tensor,
)
from .layout import SupertokenLayout
from .library import define
from .packed import check_layout
from .scatter import check_canvas

ACTIVATIONS = ("softmax", None)
NO_GRADIENT = "an exit's canvas has no gradient; in training use scatter_back(values, layout, where=halting.halted)"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Halting:
    """The outcome of one exit stage on tokens of a layout with some capacity.

    Attributes:
        layout: the survivors' layout, untrimmed (same capacity as the input's) until ``trim``.
        rows: int32 [layout.capacity], each survivor's row in the input; 0 in the tail.
        halted: bool [input capacity]; False for prefix tokens, context and the tail.
        confidence: fp32 [input capacity], the largest class probability; 0 for prefix tokens and the tail, NaN where a score is NaN.
        labels: int32 [input capacity], the most probable class; -1 for prefix tokens, the tail and rows with a NaN.
        canvas: the canvas that was written, or None.
    """

    layout: SupertokenLayout
    rows: Tensor
    halted: Tensor
    confidence: Tensor
    labels: Tensor
    canvas: Tensor | None = None

    def __repr__(self) -> str:
        """One line, without a sync: what only a GPU knows is left out."""
        count = f"{int(self.halted.sum())} halted of " if checks.readable(self.halted) else ""
        canvas = "" if self.canvas is None else f", canvas {list(self.canvas.shape)}"
        return f"Halting({count}{self.halted.shape[0]} rows, layout {self.layout!r}{canvas})"

    def trim(self) -> Halting:
        """The same with the survivors' capacity cut to their number (one host sync; none when trimmed already)."""
        layout = self.layout.trim()
        return dataclasses.replace(self, layout=layout, rows=self.rows[: layout.capacity])


torch.serialization.add_safe_globals([Halting])


def halt_tokens(
    scores: Tensor,
    layout: SupertokenLayout,
    threshold: float | Tensor,
    *,
    activation: Literal["softmax"] | None = "softmax",
    keep_per_class: int = 0,
    values: Tensor | None = None,
    canvas: Tensor | None = None,
    halted: Tensor | None = None,
) -> Halting:
    """One exit stage: halt the tokens whose confidence exceeds the threshold and pack the survivors.

    Equivalent PyTorch, without keep_per_class::

        confidence, labels = scores.float().softmax(1).max(1)
        halted = (confidence > threshold) & is_not_prefix
        survivors = (~halted).nonzero()

    Prefix tokens never halt, nor does a row with a NaN. The decision has no gradient.

    Args:
        scores: [capacity, C], floating point: logits, or probabilities with ``activation=None``.
        layout: the tokens' layout.
        threshold: a float, or a 0-dim tensor on the scores' device; compared as fp32, tokens strictly above it halt.
        activation: ``"softmax"``, or None when scores are probabilities already.
        keep_per_class: the k most confident tokens of each image and class (ties: lower row) survive as context (DToP).
        values: [capacity, C'], what the canvas receives. Default: scores.
        canvas: [B, C', rows, cols], written in place with the values of halted tokens and of the context that
            ``keep_per_class`` or ``halted`` kept back although it was confident; other cells keep their value.
        halted: bool [capacity]: replay a recorded decision instead of deciding, for rows with a NaN too; prefix tokens and the tail
            survive all the same.

    Returns:
        ``Halting``.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; a gradient would be required through the canvas.
    """
    check_layout(layout, "scores", scores)
    check_tensor("scores", scores, (layout.capacity, "C"), contiguous_last=True)
    if scores.shape[1] == 0:
        raise ValueError(f"scores: expected at least one class, got {list(scores.shape)}")
    check_choice("activation", activation, ACTIVATIONS)
    if values is None:
        values = scores
    check_tensor("values", values, (layout.capacity, "C'"), contiguous_last=True)
    check_device("values", values, scores.device, "scores")
    number, tensor = _check_stage(layout, threshold, keep_per_class, halted, canvas, values.shape[1])
    if canvas is not None:
        check_no_grad("values", values, NO_GRADIENT)
    outcome = _halt_tokens(
        scores.detach(),
        layout.cu_seqlens,
        layout.cells,
        number,
        tensor,
        activation == "softmax",
        keep_per_class,
        halted,
        values.detach(),
        canvas,
    )
    return _halting(outcome, layout, canvas)


def exit_head(
    tokens: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layout: SupertokenLayout,
    threshold: float | Tensor,
    *,
    eps: float = 1e-6,
    keep_per_class: int = 0,
    canvas: Tensor | None = None,
    halted: Tensor | None = None,
) -> Halting:
    """A linear exit in one piece: LayerNorm, [D -> C] matmul, log-softmax and ``halt_tokens``. Inference only.

    Equivalent PyTorch::

        logits = F.linear(F.layer_norm(tokens, (D,), norm_weight, norm_bias, eps), weight, bias)
        halt_tokens(logits, layout, threshold, values=logits.float().log_softmax(1), canvas=canvas, ...)

    Args:
        tokens: [capacity, D], floating point.
        norm_weight, norm_bias: [D] or None.
        weight: [C, D].
        bias: [C] or None.
        layout, threshold, keep_per_class, halted: as in ``halt_tokens``.
        eps: LayerNorm's.
        canvas: [B, C, rows, cols], receives log-probabilities.

    Returns:
        ``Halting``.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; an argument requires a gradient.
    """
    check_layout(layout, "tokens", tokens)
    check_tensor("tokens", tokens, (layout.capacity, "D"), contiguous_last=True)
    dim = tokens.shape[1]
    check_tensor("weight", weight, ("C", dim), like=tokens, like_name="tokens")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one class, got {list(weight.shape)}")
    check_optional("norm_weight", norm_weight, (dim,), like=tokens, like_name="tokens")
    check_optional("norm_bias", norm_bias, (dim,), like=tokens, like_name="tokens")
    check_optional("bias", bias, (weight.shape[0],), like=tokens, like_name="tokens")
    parameters = {"tokens": tokens, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight, "bias": bias}
    for name, parameter in parameters.items():
        check_no_grad(name, parameter, "exit_head is for inference; in training compose halt_tokens and scatter_back")
    number, tensor = _check_stage(layout, threshold, keep_per_class, halted, canvas, weight.shape[0])
    outcome = _exit_head(
        tokens,
        norm_weight,
        norm_bias,
        weight,
        bias,
        check_number("eps", eps, minimum=0),
        layout.cu_seqlens,
        layout.cells,
        number,
        tensor,
        keep_per_class,
        halted,
        canvas,
    )
    return _halting(outcome, layout, canvas)


def gather_tokens(tokens: Tensor, halting: Halting, *, tail: Tail = "zero") -> Tensor:
    """The survivors' rows, packed. Differentiable in tokens.

    Equivalent PyTorch: ``tokens[halting.rows]`` for the live rows.

    Args:
        tokens: [input capacity, D], floating point: the rows that went into the exit stage.
        halting: what ``halt_tokens`` or ``exit_head`` returned, trimmed or not.
        tail: rows past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        [halting.layout.capacity, D], bit-exact copies.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    if not isinstance(halting, Halting):
        raise TypeError(f"halting: expected a Halting, got {checks.describe(halting)}")
    check_tensor("tokens", tokens, (halting.halted.shape[0], "D"), contiguous_last=True)
    check_layout(halting.layout, "tokens", tokens)
    cu_seqlens = None if halting.layout.trimmed else halting.layout.cu_seqlens
    return _gather_tokens(tokens, halting.rows, cu_seqlens, check_tail(tail))


def _check_stage(
    layout: SupertokenLayout,
    threshold: float | Tensor,
    keep_per_class: int,
    halted: Tensor | None,
    canvas: Tensor | None,
    channels: int,
) -> tuple[float, Tensor | None]:
    """Checks that both exit ops share; the threshold as a registered op takes it."""
    check_int("keep_per_class", keep_per_class, minimum=0)
    if halted is not None:
        check_tensor("halted", halted, (layout.capacity,), dtypes=(torch.bool,))
        check_device("halted", halted, layout.device, "layout")
    if canvas is not None:
        check_canvas(canvas, channels, layout)
        check_no_grad("canvas", canvas, NO_GRADIENT)
    return checks.check_threshold("threshold", threshold, layout.device)


def _halting(outcome: tuple[Tensor, ...], layout: SupertokenLayout, canvas: Tensor | None) -> Halting:
    cu_seqlens, cells, rows, halted, confidence, labels = outcome
    survivors = SupertokenLayout.trusted(cu_seqlens, cells, layout.grid, layout.num_prefix)
    return Halting(survivors, rows, halted, confidence, labels, canvas)


def _fake_decision(cu_seqlens: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    capacity = cells.shape[0]
    return (
        torch.empty_like(cu_seqlens),
        cells.new_empty(capacity, 4),
        cells.new_empty(capacity),
        cells.new_empty(capacity, dtype=torch.bool),
        cells.new_empty(capacity, dtype=torch.float32),
        cells.new_empty(capacity),
    )


def _setup_gather_tokens(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tokens, rows, cu_seqlens, _ = inputs
    ctx.save_for_backward(rows, cu_seqlens)
    ctx.capacity = tokens.shape[0]


def _gather_tokens_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, cu_seqlens = ctx.saved_tensors
    return _gather_tokens_backward(grad, rows, cu_seqlens, ctx.capacity), None, None, None


_OUTCOME = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_halt_tokens = define(
    "halt_tokens(Tensor scores, Tensor cu_seqlens, Tensor cells, float threshold, Tensor? threshold_tensor, "
    "bool softmax, int keep_per_class, Tensor? forced, Tensor values, Tensor(a!)? canvas) -> " + _OUTCOME,
    module="halting",
    fake=lambda scores, cu_seqlens, cells, *_: _fake_decision(cu_seqlens, cells),
)
_exit_head = define(
    "exit_head(Tensor tokens, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps, "
    "Tensor cu_seqlens, Tensor cells, float threshold, Tensor? threshold_tensor, int keep_per_class, Tensor? forced, "
    "Tensor(a!)? canvas) -> " + _OUTCOME,
    module="halting",
    fake=lambda *args: _fake_decision(args[6], args[7]),
)
_gather_tokens_backward = define(
    "gather_tokens_backward(Tensor grad, Tensor rows, Tensor? cu_seqlens, SymInt capacity) -> Tensor",
    module="halting",
    fake=lambda grad, rows, cu_seqlens, capacity: grad.new_empty(capacity, grad.shape[1]),
)
_gather_tokens = define(
    "gather_tokens(Tensor tokens, Tensor rows, Tensor? cu_seqlens, bool fill_tail) -> Tensor",
    module="halting",
    fake=lambda tokens, rows, cu_seqlens, fill_tail: tokens.new_empty(rows.shape[0], tokens.shape[1]),
    setup_context=_setup_gather_tokens,
    backward=_gather_tokens_gradients,
)
