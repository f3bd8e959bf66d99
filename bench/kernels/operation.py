"""What an op of the table is: its inputs, its two implementations, and the bytes that any implementation must move.

Necessary bytes count each input once as read and each output once as written, live rows only. A gradient adds what the
backward pass must read (the output's gradient, and the inputs that the formula needs) and write (the inputs' gradients).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from step_kernels import SupertokenLayout

from .examples import Example, Source

Outputs = tuple[Tensor, ...]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k and v
# A backward pass of attention has five matmuls of the size of the forward pass's two.
BOTH_OVER_FORWARD = 3.5
# Bytes beyond which a share of the copy's bandwidth says something: more than twice the cache of an H200 (50 MB).
LARGE_ENOUGH = 120e6


class Unavailable(RuntimeError):
    """Why a rival cannot run on a device, a dtype or an input."""


def _as_they_are(outputs: Outputs, exact: Example) -> Outputs:
    return outputs


@dataclass(frozen=True)
class Rival:
    """A PyTorch contender that has a row of its own.

    Attributes:
        name: of the row.
        prepare: from an exact example to what is timed; raises `Unavailable` where that cannot run.
        compiled: it goes through torch.compile, so its first calls count against that budget.
    """

    name: str
    prepare: Callable[[Example], Attention]
    compiled: bool = False


@dataclass(frozen=True)
class Operation:
    """One op of step_kernels beside plain PyTorch.

    Attributes:
        name: as in `bench.kernels.settings.OPS`.
        shown: names of the tensors whose sizes describe the variant.
        registered: the registered ops that run, whose floor the row names.
        make: an exact example from a source.
        ours: the call of step_kernels, on either form of the example.
        live: what `ours` returned, cut to the live rows and in the order of `plain`'s outputs; not timed.
        necessary_bytes: of the forward pass on an exact example.
        plain: PyTorch compositions for the same job, functions of tensors and numbers only; the fastest is the contender.
        arguments: what `plain` is called with, from an exact example.
        rivals: instead of `plain`, contenders that all get a row; speed-ups are over the first.
        judged: what the gate compares, from the outputs and the example in fp64; the outputs themselves unless said.
        slack: further ulps, of fp32 and of the largest output, that the gate allows: two labels tie where each other's score
            may be off by its own roundings.
        gradients: the tensors that a forward + backward row differentiates; empty where there is no gradient.
        registered_backward: the registered ops of the backward pass.
        backward_bytes: necessary bytes of the backward pass alone.
        flops: of the forward pass on an exact example, for attentions and linear layers; forward + backward (of attentions only)
            has `BOTH_OVER_FORWARD` times as many.
        batches: images of an input, as a multiple of the run's.
        gpu_only: left out on a CPU: an input for which caches there are too small anyway.
        autotuned: torch.compile searches for the fastest kernels (max-autotune) instead of taking its default ones.
        tight: on a GPU, step_kernels runs once more on an untrimmed layout whose capacity is the live count.
        makes_layout: its input decides the layout, so an input with other numbers has another one.
    """

    name: str
    shown: tuple[str, ...]
    registered: tuple[str, ...]
    make: Callable[[Source], Example]
    ours: Callable[[Example], Any]
    live: Callable[[Any, Example], Outputs]
    necessary_bytes: Callable[[Example], int]
    plain: tuple[Callable[..., Any], ...] = ()
    arguments: Callable[[Example], tuple[Any, ...]] = lambda example: ()  # unused where there is no `plain`
    rivals: tuple[Rival, ...] = ()
    judged: Callable[[Outputs, Example], Outputs] = _as_they_are
    slack: int = 0
    gradients: tuple[str, ...] = ()
    registered_backward: tuple[str, ...] = ()
    backward_bytes: Callable[[Example], int] | None = None
    flops: Callable[[Example], int] | None = None
    batches: float = 1.0
    gpu_only: bool = False
    autotuned: bool = False
    tight: bool = False
    makes_layout: bool = False

    def batch(self, batch: int) -> int:
        """Images of an input, where the run has `batch`."""
        return max(1, round(batch * self.batches))


def beyond_any_cache(operation: Operation, batches: int) -> Operation:
    """The forward pass on so many times the images that it must move `LARGE_ENOUGH` bytes at a GPU's default sizes."""
    return dataclasses.replace(
        operation, batches=batches, gpu_only=True, gradients=(), registered_backward=(), backward_bytes=None
    )


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements, whatever the strides."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def layout_bytes(layout: SupertokenLayout) -> int:
    """Bytes of a trimmed layout's two tensors."""
    return nbytes(layout.cu_seqlens, layout.cells)


def covered_cells(layout: SupertokenLayout, where: Tensor | None = None) -> int:
    """Cells that the tokens of a trimmed layout cover, or the selected ones among them."""
    sides = layout.cells[:, 3].long()
    return int((sides if where is None else sides[where]).square().sum())


def block_rows(layout: SupertokenLayout) -> int:
    """Rows of a trimmed layout that hold a block, not a prefix token."""
    return layout.capacity - layout.batch_size * layout.num_prefix


def first_rows(result: Any, example: Example) -> Outputs:
    """`live` of an op that returns one tensor with a row per token."""
    return (result[: example.layout.num_tokens],)


def whole(result: Any, example: Example) -> Outputs:
    """`live` of an op that returns one tensor without a tail."""
    return (result,)
