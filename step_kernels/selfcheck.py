"""Every public op against the fp64 reference, on one device and in one dtype: what ``python -m step_kernels`` runs."""

from __future__ import annotations

import functools
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_schedule, ragged_attention
from .backend import use_backend
from .class_attention import class_attention, class_scores
from .halting import exit_head, gather_tokens, halt_tokens
from .layout import SupertokenLayout
from .linear import ragged_linear
from .masked_attention import masked_attention
from .merge import embed_patches, merge_patches, merge_tokens
from .norm import ragged_layer_norm
from .prefix import replace_prefix
from .resolve import resolve_layout
from .rope import ragged_rope, rope_table
from .scatter import scatter_back, scatter_into
from .upsample import upsample_argmax

CAP = 16  # ulp of the largest output; the reference's own errors stay below 4
BATCH, GRID, PATCH, DIM, HEADS, CLASSES = 2, (10, 12), 4, 32, 2, 7


@dataclass
class Outcome:
    """One op's largest error against fp64, and the largest that passes; or the exception that it raised."""

    op: str
    error: float
    bound: float
    raised: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


def attempt(op: str, check: Callable[[], tuple[float, float]]) -> Outcome:
    """What ``check`` finds: error and bound. An exception is a failure of this one alone."""
    try:
        return Outcome(op, *check())
    except Exception as error:
        return Outcome(op, math.inf, 0.0, told(error))


def told(error: Exception) -> str:
    """The exception and the innermost calls, without folders: their names say more about the person than about the fault."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    calls = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    message = re.sub(r"(?<![\w.])/(?:[^\s/:\"'()]+/)+", "", str(error).strip())
    return f"{type(error).__name__}: {message[:1500]} (in {calls})"


class Inputs:
    """Random tensors of one dtype on one device; the same numbers, rounded to ``rounded``, for every dtype and device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounded: torch.dtype) -> None:
        self.device, self.dtype, self.rounded = device, dtype, rounded
        self.generator = torch.Generator().manual_seed(0)
        scores = [self.random(BATCH, GRID[0] // side, GRID[1] // side) for side in (2, 4)]
        self.layout = resolve_layout(scores, sides=(2, 4), thresholds=(0.2, 0.8), grid=GRID, num_prefix=1)

    def random(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.rounded)
        return values.to(self.device, self.dtype)

    def tokens(self, width: int) -> Tensor:
        return self.random(self.layout.capacity, width)

    def images(self) -> Tensor:
        return self.random(BATCH, 3, GRID[0] * PATCH, GRID[1] * PATCH)

    def canvas(self) -> Tensor:
        return torch.zeros(BATCH, CLASSES, *GRID, device=self.device, dtype=self.dtype)


Case = Callable[[Inputs], tuple[Tensor, ...]]


def _resolve_layout(inputs: Inputs) -> tuple[Tensor, ...]:
    again = SupertokenLayout.from_sides(inputs.layout.sides(), num_prefix=1)
    return inputs.layout.cu_seqlens, inputs.layout.cells, again.cells


def _embed_patches(inputs: Inputs) -> tuple[Tensor, ...]:
    images, weight, bias = inputs.images(), inputs.random(DIM, 3, PATCH, PATCH), inputs.random(DIM)
    positions, prefix = inputs.random(GRID[0] * GRID[1], DIM), inputs.random(1, DIM)
    return (embed_patches(images, inputs.layout, weight, bias, pos_embed=positions, prefix=prefix),)


def _ragged_attention(inputs: Inputs) -> tuple[Tensor, ...]:
    q, k, v = inputs.tokens(3 * DIM).view(-1, 3, HEADS, DIM // HEADS).unbind(1)
    layout = inputs.layout
    schedule = attention_schedule(layout.cu_seqlens, layout.capacity)
    return (ragged_attention(q, k, v, layout.cu_seqlens, layout.max_seqlen, schedule=schedule),)


def _masked_attention(inputs: Inputs) -> tuple[Tensor, ...]:
    q, k, v = inputs.random(BATCH, 40, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    keep = inputs.random(BATCH, 40) > 0
    return masked_attention(q, k, v, keep), masked_attention(q, k, v, keep, keys="all")


def _class_attention(inputs: Inputs) -> tuple[Tensor, ...]:
    q = inputs.random(1, CLASSES, HEADS, DIM // HEADS).expand(BATCH, -1, -1, -1)
    k, v = inputs.tokens(2 * DIM).view(-1, 2, HEADS, DIM // HEADS).unbind(1)
    layout = inputs.layout
    out, scores = class_attention(q, k, v, layout.cu_seqlens, layout.max_seqlen, return_scores=True)
    return out, scores


def _class_scores(inputs: Inputs) -> tuple[Tensor, ...]:
    return (class_scores(inputs.random(BATCH, CLASSES, DIM), inputs.tokens(DIM), inputs.layout.cu_seqlens, scale=0.3),)


def _halt_tokens(inputs: Inputs) -> tuple[Tensor, ...]:
    scores, tokens, canvas = inputs.tokens(CLASSES), inputs.tokens(DIM), inputs.canvas()
    halting = halt_tokens(scores, inputs.layout, 0.5, keep_per_class=1, canvas=canvas)
    survivors = gather_tokens(tokens, halting)
    return halting.halted, halting.rows, halting.layout.cells, halting.labels, halting.confidence, canvas, survivors


def _exit_head(inputs: Inputs) -> tuple[Tensor, ...]:
    tokens, weight, canvas = inputs.tokens(DIM), inputs.random(CLASSES, DIM) / 4, inputs.canvas()
    norm = inputs.random(DIM), inputs.random(DIM)
    halting = exit_head(tokens, *norm, weight, None, inputs.layout, 0.5, canvas=canvas)
    return halting.halted, halting.rows, halting.confidence, canvas


def _ragged_linear(inputs: Inputs) -> tuple[Tensor, ...]:
    x, weight, bias = inputs.tokens(DIM), inputs.random(DIM, DIM), inputs.random(DIM)
    gamma, residual = inputs.random(DIM), inputs.tokens(DIM)
    fused = {"activation": "gelu", "gamma": gamma, "residual": residual}
    return (ragged_linear(x, weight, bias, layout=inputs.layout, **fused),)  # type: ignore[arg-type]


def _ragged_layer_norm(inputs: Inputs) -> tuple[Tensor, ...]:
    x, weight, bias = inputs.tokens(DIM), inputs.random(DIM), inputs.random(DIM)
    return (ragged_layer_norm(x, weight, bias, 1e-6, layout=inputs.layout),)


def _scatter_into(inputs: Inputs) -> tuple[Tensor, ...]:
    return (scatter_into(inputs.canvas(), inputs.tokens(CLASSES), inputs.layout),)


def _replace_prefix(inputs: Inputs) -> tuple[Tensor, ...]:
    tokens, layout = replace_prefix(inputs.tokens(DIM), inputs.layout, inputs.random(3, DIM))
    return tokens, layout.cells


def _rope(inputs: Inputs) -> tuple[Tensor, ...]:
    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    frequencies = inputs.random(DIM // HEADS // 2, 2).to(wide) / 32  # a turn or so over the grid
    table = rope_table(inputs.layout, frequencies, inputs.random(DIM // HEADS // 2).to(wide))
    q, k, _ = inputs.tokens(3 * DIM).view(-1, 3, HEADS, DIM // HEADS).unbind(1)
    halves = ragged_rope(q, k, table, rotate_half=True, layout=inputs.layout)
    return table, *ragged_rope(q, k, table, layout=inputs.layout), *halves


def _upsample_argmax(inputs: Inputs) -> tuple[Tensor, ...]:
    canvas = inputs.random(BATCH, CLASSES, *GRID)
    labels = upsample_argmax(canvas, (45, 50)).long()
    logits = F.interpolate(canvas.double(), (45, 50), mode="bilinear", align_corners=False)
    return (logits.gather(1, labels[:, None]),)  # the best class's logit: classes may tie within rounding


CASES: dict[str, Case] = {
    "resolve_layout, from_sides": _resolve_layout,
    "merge_patches": lambda inputs: (merge_patches(inputs.images(), inputs.layout, PATCH),),
    "embed_patches": _embed_patches,
    "merge_tokens": lambda inputs: (merge_tokens(inputs.random(BATCH, GRID[0] * GRID[1], DIM), inputs.layout),),
    "ragged_layer_norm": _ragged_layer_norm,
    "ragged_linear": _ragged_linear,
    "attention_schedule, ragged_attention": _ragged_attention,
    "masked_attention": _masked_attention,
    "class_attention": _class_attention,
    "class_scores": _class_scores,
    "halt_tokens, gather_tokens": _halt_tokens,
    "exit_head": _exit_head,
    "replace_prefix": _replace_prefix,
    "rope_table, ragged_rope": _rope,
    "scatter_back": lambda inputs: (scatter_back(inputs.tokens(CLASSES), inputs.layout),),
    "scatter_into": _scatter_into,
    "upsample_argmax": _upsample_argmax,
}


def run(device: torch.device, dtype: torch.dtype) -> list[Outcome]:
    """Run every case on ``device`` in ``dtype``, with the backend in force, against the CPU reference.

    A case passes when its error against the fp64 reference is at most twice that of the reference in ``dtype`` and at most ``CAP`` ulp of
    the largest output, plus one ulp. Integer and bool outputs must be equal.
    """
    return [attempt(name, functools.partial(_error_and_bound, case, device, dtype)) for name, case in CASES.items()]


def _error_and_bound(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    cpu = torch.device("cpu")
    ours = case(Inputs(device, dtype, dtype))
    with use_backend("reference"):
        plain = case(Inputs(cpu, dtype, dtype))
        truth = case(Inputs(cpu, torch.float64, dtype))
    return worst([got.cpu() for got in ours], plain, truth, dtype)


def worst(
    ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """Error and bound of the output that is furthest off; ``plain``: the reference in ``dtype``."""
    errors, bounds = [], []
    for got, peer, exact in zip(ours, plain, truth, strict=True):
        errors.append(_error(got, exact))
        ulp = torch.finfo(dtype).eps * float(exact.abs().max()) if exact.is_floating_point() else 0.0
        # On a CPU the peer is the op itself: only the cap, in units of the dtype, can then tell that both are wrong.
        bounds.append(min(2 * _error(peer, exact), CAP * ulp) + ulp if exact.is_floating_point() else 0.0)
    found = max(range(len(errors)), key=lambda i: errors[i] - bounds[i] if errors[i] == errors[i] else math.inf)
    return errors[found], bounds[found]


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).abs().max())
