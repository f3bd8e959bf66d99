"""What a row of the table says before, and after, the gate and the clock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from ..schema import FAILED, PASSED
from ..timing import Timings
from .contenders import BACKWARD, OURS, Contender
from .examples import Example, Shape
from .gate import Verdict
from .operation import BOTH_OVER_FORWARD, Operation
from .schema import NOT_RUN, KernelRow

TIMED = "right before the clock, wrong under it"
LATER = "right before the clock, wrong after it"
STALE = "right on the inputs of the clock, wrong on one that got other numbers after it"


def blank_row(operation: Operation, direction: str, exact: Sequence[Example], shape: Shape) -> KernelRow:
    """What is known of an op before anything has run."""
    amounts = [operation.necessary_bytes(example) for example in exact]
    if direction == BACKWARD and operation.backward_bytes is not None:
        amounts = [a + operation.backward_bytes(example) for a, example in zip(amounts, exact, strict=True)]
    flops = None
    if operation.flops is not None:
        forward = sum(map(operation.flops, exact)) / len(exact)
        flops = round(forward * (BOTH_OVER_FORWARD if direction == BACKWARD else 1.0))
    dtype = str(shape.dtype).removeprefix("torch.")
    return KernelRow(
        op=operation.name,
        direction=direction,
        variant=f"{dtype}, {_described(operation, exact)}",
        device=shape.device.type,
        dtype=dtype,
        contender=OURS,
        floor=None,
        composition=None,
        gate=NOT_RUN,
        problem="not yet",
        max_error=None,
        allowed_error=None,
        necessary_bytes=round(sum(amounts) / len(amounts)),
        flops=flops,
    )


def _described(operation: Operation, exact: Sequence[Example]) -> str:
    live = round(sum(example.layout.capacity for example in exact) / len(exact))
    parts = [f"{name} {_sizes(exact[0], name, live)}" for name in operation.shown]
    parts += [f"{live} live rows", f"batch {exact[0].layout.batch_size}"]
    if operation.rivals:  # an attention, whose work depends on the single images
        extremes = torch.stack([example.layout.lengths() for example in exact]).aminmax()
        parts.append(f"{' to '.join(dict.fromkeys(str(int(extreme)) for extreme in extremes))} an image")
    return ", ".join(parts)


def _sizes(example: Example, name: str, live: int) -> list[int]:
    tensor = example[name]
    is_per_token = name in example.packed and tensor.shape[0] == example.layout.capacity
    return [live, *tensor.shape[1:]] if is_per_token else list(tensor.shape)


def of_contender(blank: KernelRow, contender: Contender) -> KernelRow:
    """The row of one contender, before its gate."""
    return dataclasses.replace(
        blank, contender=contender.name, floor=contender.floor, composition=contender.composition
    )


def judged(row: KernelRow, verdict: Verdict, problem: str | None = None) -> KernelRow:
    """The row with the gate's verdict; `problem` is what is to be known of one that fails."""
    return dataclasses.replace(
        row,
        gate=PASSED if verdict.passed else FAILED,
        max_error=_finite(verdict.max_error),
        allowed_error=_finite(verdict.allowed_error),
        problem=None if verdict.passed else problem,
    )


def timed(row: KernelRow, timing: Timings, copy_rate: float, extra_memory_bytes: int | None) -> KernelRow:
    """The row with what the clock says; `copy_rate` in GB/s."""
    rate = row.necessary_bytes / timing.median / 1e6
    return dataclasses.replace(
        row,
        **timing.fields(),
        gigabytes_per_second=rate,
        copy_gigabytes_per_second=copy_rate,
        share_of_copy=rate / copy_rate,
        teraflops_per_second=None if row.flops is None else row.flops / timing.median / 1e9,
        extra_memory_bytes=extra_memory_bytes,
    )


def compared(row: KernelRow, baseline: float | None) -> KernelRow:
    """The row with its speed-up over the baseline's median, where both were timed."""
    if baseline is None or row.median_ms is None:
        return row
    return dataclasses.replace(row, speedup=baseline / row.median_ms)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
