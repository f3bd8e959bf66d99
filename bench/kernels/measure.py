"""From an op to its rows: inputs, gate, clock, gate again, gate on an input that nobody has seen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from step_kernels.model.cli.progress import Progress
from step_kernels.model.vit import PRESETS

from ..compiling import CompileBudget
from ..model.costs import peak_on_device
from ..schema import PASSED
from ..settings import DTYPES, PATCH_SIZE
from ..timing import Clock, DeviceClock, Timings, interleave
from . import gate, ops_attention, ops_canvas, ops_exits, ops_linear, ops_merging, rows
from .answers import Answer, Answers, renewal
from .clock import device_timeline
from .contenders import BACKWARD, EAGER, FORWARD, Contender, build_contenders, in_one_line, plain_contender
from .examples import NUM_PREFIX, Example, Shape, Source
from .layouts import Drawn, draw_layouts
from .operation import Operation
from .schema import NOT_RUN, KernelRow
from .settings import Settings

OPERATIONS = (
    *ops_merging.OPERATIONS, *ops_exits.OPERATIONS, *ops_canvas.OPERATIONS, *ops_attention.OPERATIONS, *ops_linear.OPERATIONS
)  # fmt: skip
# What bars look at, in case that the run is cut short; those that stand beside compiled PyTorch while there is a budget for it.
FIRST = (
    ("upsample_argmax", ops_linear.GELU, ops_linear.RESIDUAL),
    (
        *("exit_head", "ragged_attention_wide", "ragged_attention_equal", ops_linear.BIAS),
        *(operation.name for operation in OPERATIONS if operation.gpu_only),
    ),
)
INPUTS = {"cuda": 8, "cpu": 3}  # layouts and data that rotate
COPY = "copy"
# Each of the two buffers is many times the cache: 50 MB on the largest GPU, some 16 MB for two cores of a server.
COPY_BYTES = {"cuda": 512 * 2**20, "cpu": 64 * 2**20}
Task = tuple[Operation, str]


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
        # Random, because zeros may travel faster.
        self.copy_from = torch.randint(0, 256, (amount,), dtype=torch.uint8, device=self.shape.device)
        self.copy_to = torch.empty_like(self.copy_from)
        self.clock: Clock = DeviceClock(self.shape.device)
        if self.shape.device.type == "cuda":
            self.clock = cast(Clock, device_timeline(self.copy_to))  # `interleave` only subtracts what a clock reads
        self.inputs = INPUTS[self.shape.device.type]
        self._drawn: dict[int, list[Drawn]] = {}

    def rows(self) -> list[KernelRow]:
        """All rows, in the order of the table."""
        tasks = tasks_of(self.settings.ops, self.shape.device)
        found: dict[int, list[KernelRow]] = {}
        with Progress("ops", len(tasks)) as progress:
            for number in sorted(range(len(tasks)), key=lambda number: _rank(tasks[number][0])):
                operation, direction = tasks[number]
                found[number] = self.measure(operation, direction, self.drawn(operation), 1 / len(tasks))
                self.finished(_in_order(found))
                progress.advance(f"{operation.name}, {direction}")
        return _in_order(found)

    def drawn(self, operation: Operation) -> list[Drawn]:
        """The layouts of an op's inputs; ops with as many images share them."""
        batch = operation.batch(self.shape.batch)
        if batch not in self._drawn:
            self._drawn[batch] = draw_layouts(
                self.inputs,
                batch,
                self.shape.grid,
                num_prefix=NUM_PREFIX,
                dtype=self.shape.dtype,
                seed=self.settings.seed,
                device=self.shape.device,
            )
        return self._drawn[batch]

    def measure(
        self, operation: Operation, direction: str, drawn: Sequence[Drawn], share: float = 1.0
    ) -> list[KernelRow]:
        """One op in one direction, `share` of the budget; one row that says why where the comparison breaks off, for memory say."""
        shape = dataclasses.replace(self.shape, batch=operation.batch(self.shape.batch))
        sources = [Source(shape, one, self.settings.seed + number) for number, one in enumerate(drawn)]
        # What nobody has seen when the clock stops: of the last layout, or of another where that is the answer.
        fresh = Source(shape, drawn[0 if operation.makes_layout else -1], self.settings.seed + len(drawn))
        exact = [operation.make(source) for source in sources]
        blank = rows.blank_row(operation, direction, exact, shape)
        try:
            return self.compete(operation, direction, exact, fresh, blank, share)
        except Exception as error:  # the other ops are still worth having, and a GPU may be lent only once
            traceback.print_exc()  # whose fault it was, a contender's or the bench's, is not in one line
            return [dataclasses.replace(blank, problem=f"comparison broke off: {in_one_line(error)}")]
        finally:
            torch.compiler.reset()

    def compete(
        self,
        operation: Operation,
        direction: str,
        exact: Sequence[Example],
        fresh: Source,
        blank: KernelRow,
        share: float,
    ) -> list[KernelRow]:
        """Gate, clock for those that passed, gate again on the same inputs and on one with other numbers."""
        truths = gate.find_truths(operation, direction, exact, self.shape.dtype)
        plain = self.fastest(operation, direction, exact, truths) if operation.plain else None
        contenders = build_contenders(operation, direction, exact, self.shape.device, plain)
        found = {contender.name: self.judge(operation, contender, truths, blank) for contender in contenders}
        passed = [contender for contender in contenders if found[contender.name].gate == PASSED]
        if passed:
            timings, answers = self.time(passed, share)
            later = [
                self.judge_later(operation, contender, truths, blank, answers.of[contender.name])
                for contender in passed
            ]
            unseen = self.rewrite_last(operation, direction, exact, fresh, passed, truths)
            for contender, row in zip(passed, later, strict=True):
                if row.gate == PASSED:
                    other = self.judge(operation, contender, unseen, blank, after=rows.STALE)
                    timing = timings[contender.name]
                    row = other if other.gate != PASSED else self.with_timing(row, timing, timings[COPY], contender)
                found[contender.name] = row
        baseline = found[contenders[1].name].median_ms
        return [rows.compared(row, baseline) for row in found.values()]

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
        renew, rounds = renewal(rivals.values()), 2 * self.inputs
        timings = interleave(rivals, inputs=self.inputs, clock=self.clock, rounds=rounds, renew=renew)
        best = min(rivals, key=lambda name: timings[name].median)
        return next(function for function in operation.plain if function.__name__ == best)

    def judge_later(
        self,
        operation: Operation,
        contender: Contender,
        truths: Sequence[gate.Truth],
        blank: KernelRow,
        answer: Answer,
    ) -> KernelRow:
        """The row after the clock: what a timed call gave, then new calls on the same inputs."""
        row = rows.judged(
            rows.of_contender(blank, contender), gate.check_answer(operation, contender, answer, truths), rows.TIMED
        )
        return row if row.gate != PASSED else self.judge(operation, contender, truths, blank, after=rows.LATER)

    def judge(
        self,
        operation: Operation,
        contender: Contender,
        truths: Sequence[gate.Truth],
        blank: KernelRow,
        *,
        after: str | None = None,
    ) -> KernelRow:
        """The row with the gate's verdict, or why there is none. `after`: what a failure after the clock is called."""
        row = rows.of_contender(blank, contender)
        problem = contender.problem
        if problem is None and contender.compiled and after is None:
            problem = self.compiling.spend(functools.partial(_call_on_all, contender))
        if problem is None:
            try:
                return rows.judged(row, gate.check(operation, contender, truths), after)
            except Exception as error:  # a contender may raise anything; the other rows are still worth having
                problem = in_one_line(error)
        return dataclasses.replace(row, gate=NOT_RUN, problem=problem, max_error=None, allowed_error=None)

    def time(self, contenders: Sequence[Contender], share: float) -> tuple[dict[str, Timings], Answers]:
        """Times the contenders and a copy, interleaved, and keeps one timed answer of each contender."""
        calls: dict[str, Callable[[int], object]] = {contender.name: contender for contender in contenders}
        calls[COPY] = lambda _: self.copy_to.copy_(self.copy_from)
        minutes, rounds = self.settings.minutes, self.settings.repeats
        seconds = None if minutes is None else minutes * 60 * share
        answers = Answers(contenders, gate.compared_inputs(self.inputs))
        timings = interleave(
            calls,
            inputs=self.inputs,
            clock=self.clock,
            seconds=seconds,
            rounds=rounds,
            renew=renewal(contenders),
            keep=answers.keep,
        )
        return timings, answers

    def rewrite_last(
        self,
        operation: Operation,
        direction: str,
        exact: Sequence[Example],
        fresh: Source,
        contenders: Sequence[Contender],
        truths: Sequence[gate.Truth],
    ) -> list[gate.Truth]:
        """Gives the last input other numbers, in every form of it that a contender has, and finds its new truth."""
        numbers = operation.make(fresh)
        for form in (exact, *(contender.examples for contender in contenders)):
            form[-1].take_over(numbers, integers=operation.makes_layout)
        return gate.find_new_truth(operation, direction, exact, self.shape.dtype, truths)

    def with_timing(self, row: KernelRow, timing: Timings, copy: Timings, contender: Contender) -> KernelRow:
        """The row with what the clock says, and with the memory that one more call takes."""
        extra = peak_on_device(lambda: contender(0)) if self.shape.device.type == "cuda" else None
        return rows.timed(row, timing, 2 * self.copy_to.numel() / copy.median / 1e6, extra)


def tasks_of(ops: Sequence[str], device: torch.device) -> list[Task]:
    """The ops of these names and their directions, in the order of the table."""
    operations = [operation for operation in OPERATIONS if operation.name in ops]
    if device.type != "cuda":
        operations = [operation for operation in operations if not operation.gpu_only]
    return [(operation, direction) for operation in operations for direction in directions(operation)]


def _rank(operation: Operation) -> int:
    return next((rank for rank, names in enumerate(FIRST) if operation.name in names), len(FIRST))


def directions(operation: Operation) -> tuple[str, ...]:
    """Forward alone where there is no gradient."""
    return (FORWARD, BACKWARD) if operation.gradients else (FORWARD,)


def _in_order(found: Mapping[int, Sequence[KernelRow]]) -> list[KernelRow]:
    return [row for _, own in sorted(found.items()) for row in own]


def _call_on_all(contender: Contender) -> None:
    for number in range(len(contender.examples)):
        contender(number)
