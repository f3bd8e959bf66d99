"""From an op to its rows: inputs, gate, clock, gate again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from step_kernels.model.progress import Progress
from step_kernels.model.vit import PRESETS

from ..compiling import CompileBudget
from ..model.costs import peak_on_device
from ..schema import FAILED, PASSED
from ..settings import DTYPES, PATCH_SIZE
from ..timing import Clock, DeviceClock, Timings, interleave
from . import gate, ops_attention, ops_canvas, ops_exits, ops_merging
from .clock import device_timeline
from .contenders import (
    BACKWARD,
    EAGER,
    FORWARD,
    OURS,
    Contender,
    build_contenders,
    in_one_line,
    plain_contender,
)
from .examples import NUM_PREFIX, Example, Shape, Source
from .layouts import Drawn, draw_layouts
from .operation import BOTH_OVER_FORWARD, Operation
from .schema import NOT_RUN, KernelRow
from .settings import Settings

OPERATIONS = (
    *ops_merging.OPERATIONS, *ops_exits.OPERATIONS, *ops_canvas.OPERATIONS, *ops_attention.OPERATIONS
)  # fmt: skip
INPUTS = 3  # layouts and data that rotate
COPY = "copy"
# Each of the two buffers is many times the cache: 50 MB on the largest GPU, some 16 MB for two cores of a server.
COPY_BYTES = {"cuda": 512 * 2**20, "cpu": 64 * 2**20}


class Bench:
    """What the ops of one run share: sizes, layouts, buffers of the copy, budgets."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        cells = settings.size // PATCH_SIZE
        self.shape = Shape(
            batch=settings.batch,
            grid=(cells, cells),
            patch=PATCH_SIZE,
            dim=PRESETS[settings.model]["embed_dim"],
            classes=settings.classes,
            dtype=DTYPES[settings.dtype],
            device=torch.device(settings.device),
        )
        self.compiling = CompileBudget(settings.compile_minutes, self.shape.device)
        self.finished: Callable[[Sequence[KernelRow]], None] = lambda rows: None  # gets all rows so far after each op
        amount = COPY_BYTES[self.shape.device.type]
        self.copy_from, self.copy_to = torch.zeros(2, amount, dtype=torch.uint8, device=self.shape.device).unbind()
        self.clock: Clock = DeviceClock(self.shape.device)
        if self.shape.device.type == "cuda":
            self.clock = cast(Clock, device_timeline(self.copy_to))  # `interleave` only subtracts what a clock reads

    def rows(self) -> list[KernelRow]:
        """All rows, in the order of the table."""
        operations = [operation for operation in OPERATIONS if operation.name in self.settings.ops]
        tasks = [(operation, direction) for operation in operations for direction in _directions(operation)]
        drawn = draw_layouts(
            INPUTS,
            self.shape.batch,
            self.shape.grid,
            num_prefix=NUM_PREFIX,
            dtype=self.shape.dtype,
            seed=self.settings.seed,
            device=self.shape.device,
        )
        rows: list[KernelRow] = []
        with Progress("ops", len(tasks)) as progress:
            for operation, direction in tasks:
                rows += self.measure(operation, direction, drawn, 1 / len(tasks))
                self.finished(rows)
                progress.advance(f"{operation.name}, {direction}")
        return rows

    def measure(
        self, operation: Operation, direction: str, drawn: Sequence[Drawn], share: float = 1.0
    ) -> list[KernelRow]:
        """One op in one direction: gate, clock for those that passed, gate again. `share` is its part of the budget."""
        sources = [Source(self.shape, one, self.settings.seed + number) for number, one in enumerate(drawn)]
        exact = [operation.make(source) for source in sources]
        truths = gate.find_truths(operation, direction, exact, self.shape.dtype)
        plain = self.fastest(operation, direction, exact, truths) if operation.plain else None
        contenders = build_contenders(operation, direction, exact, self.shape.device, plain)
        blank = _blank_row(operation, direction, exact, self.shape)
        rows = {contender.name: self.judge(operation, contender, truths, blank) for contender in contenders}
        passed = {contender.name: contender for contender in contenders if rows[contender.name].gate == PASSED}
        timings = self.time(passed, share) if passed else {}
        for name, contender in passed.items():
            rows[name] = self.judge(operation, contender, truths, blank, again=True)
            if rows[name].gate == PASSED:
                rows[name] = self.with_timing(rows[name], timings[name], timings[COPY], contender)
        torch.compiler.reset()
        baseline = rows[contenders[1].name].median_ms
        return [_compared(row, baseline) for row in rows.values()]

    def fastest(
        self, operation: Operation, direction: str, exact: Sequence[Example], truths: Sequence[gate.Truth]
    ) -> Callable[..., Any]:
        """Of the PyTorch compositions that pass the gate, the one to be timed; the first one where none does."""
        rivals: dict[str, Contender] = {}
        for function in operation.plain if len(operation.plain) > 1 else ():
            rival = plain_contender(EAGER, function, operation, direction, exact)
            with contextlib.suppress(Exception):  # it has no memory for it, say; `judge` names the reason if all fail
                if gate.check(operation, rival, truths).passed:
                    rivals[function.__name__] = rival
        if not rivals:
            return operation.plain[0]
        timings = interleave(rivals, inputs=INPUTS, clock=self.clock, rounds=2 * INPUTS)
        best = min(rivals, key=lambda name: timings[name].median)
        return next(function for function in operation.plain if function.__name__ == best)

    def judge(
        self,
        operation: Operation,
        contender: Contender,
        truths: Sequence[gate.Truth],
        blank: KernelRow,
        *,
        again: bool = False,
    ) -> KernelRow:
        """The row with the gate's verdict, or with the reason why there is none."""
        row = dataclasses.replace(
            blank, contender=contender.name, floor=contender.floor, composition=contender.composition
        )
        problem = contender.problem
        if problem is None and contender.compiled and not again:
            problem = self.compiling.spend(functools.partial(_call_on_all, contender))
        if problem is None:
            try:
                verdict = gate.check(operation, contender, truths)
            except Exception as error:  # a contender may raise anything; the other rows are still worth having
                problem = in_one_line(error)
        if problem is not None:
            row = dataclasses.replace(row, gate=NOT_RUN, problem=problem)
        else:
            row = dataclasses.replace(
                row,
                gate=PASSED if verdict.passed else FAILED,
                max_error=_finite(verdict.max_error),
                allowed_error=_finite(verdict.allowed_error),
                problem="right before the clock, wrong after it" if again and not verdict.passed else None,
            )
        return row

    def time(self, contenders: Mapping[str, Contender], share: float) -> dict[str, Timings]:
        """Times the contenders and a copy, interleaved."""
        calls: dict[str, Callable[[int], object]] = {**contenders, COPY: lambda _: self.copy_to.copy_(self.copy_from)}
        minutes, rounds = self.settings.minutes, self.settings.repeats
        seconds = None if minutes is None else minutes * 60 * share
        return interleave(calls, inputs=INPUTS, clock=self.clock, seconds=seconds, rounds=rounds)

    def with_timing(self, row: KernelRow, timing: Timings, copy: Timings, contender: Contender) -> KernelRow:
        """The row with what the clock says."""
        rate = row.necessary_bytes / timing.median / 1e6
        copy_rate = 2 * self.copy_to.numel() / copy.median / 1e6
        return dataclasses.replace(
            row,
            rounds=len(timing.milliseconds),
            median_ms=timing.median,
            p20_ms=timing.p20,
            p80_ms=timing.p80,
            gigabytes_per_second=rate,
            copy_gigabytes_per_second=copy_rate,
            share_of_copy=rate / copy_rate,
            teraflops_per_second=None if row.flops is None else row.flops / timing.median / 1e9,
            extra_memory_bytes=peak_on_device(lambda: contender(0)) if self.shape.device.type == "cuda" else None,
        )


def _call_on_all(contender: Contender) -> None:
    for number in range(len(contender.examples)):
        contender(number)


def _directions(operation: Operation) -> tuple[str, ...]:
    return (FORWARD, BACKWARD) if operation.gradients else (FORWARD,)


def _blank_row(operation: Operation, direction: str, exact: Sequence[Example], shape: Shape) -> KernelRow:
    amounts = [operation.necessary_bytes(example) for example in exact]
    if direction == BACKWARD and operation.backward_bytes is not None:
        amounts = [a + operation.backward_bytes(example) for a, example in zip(amounts, exact, strict=True)]
    lengths, flops = "", None
    if operation.flops is not None:
        extremes = torch.stack([example.layout.lengths() for example in exact]).aminmax()
        lengths = f", {' to '.join(dict.fromkeys(str(int(extreme)) for extreme in extremes))} an image"
        forward = sum(map(operation.flops, exact)) / len(exact)
        flops = round(forward * (BOTH_OVER_FORWARD if direction == BACKWARD else 1.0))
    live = round(sum(example.layout.capacity for example in exact) / len(exact))
    dtype = str(shape.dtype).removeprefix("torch.")
    sizes = [f"{name} {_sizes(exact[0], name, live)}" for name in operation.shown]
    return KernelRow(
        op=operation.name,
        direction=direction,
        variant=", ".join([dtype, *sizes, f"{live} live rows"]) + lengths,
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


def _sizes(example: Example, name: str, live: int) -> list[int]:
    tensor = example[name]
    is_per_token = name in example.packed and tensor.shape[0] == example.layout.capacity
    return [live, *tensor.shape[1:]] if is_per_token else list(tensor.shape)


def _compared(row: KernelRow, baseline: float | None) -> KernelRow:
    if baseline is None or row.median_ms is None:
        return row
    return dataclasses.replace(row, speedup=baseline / row.median_ms)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
