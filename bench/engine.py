"""One case, several contenders, one process: gate, interleaved clock, gate again on what the clock saw, rows."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from . import costs
from .clock import Broken, Clock, Timed, broken, interleave
from .gate import Expected, Judge, Outputs, Verdict, worst
from .result import BROKE, FAILED, LATER, LOST, PASSED, UNFINISHED, Row


class NotRun(Exception):
    """Raised by a builder: why its contender cannot run here. A row says so, without a traceback."""


def as_tuple(result: Any, of: object) -> Outputs:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    What it writes in place must be its own: the others have their turn before its last result is judged.
    """

    call: Callable[[int], Any]  # what is timed, on the input of that number
    view: Callable[[Any, int], Outputs] = as_tuple  # what the gate compares: tails cut off, labels as regret; not timed
    ours: bool = False
    note: str = ""  # what exactly ran: the floor, the composition, the compile mode
    prepare: Callable[[int], None] = lambda number: None  # before each call, not timed: resets what it writes in place
    expected: Expected | None = None  # what it must compute, where that is not the case's: of other tokens, say
    flops: float | None = None  # of one call, where they are not the case's
    facts: Mapping[str, Any] = field(default_factory=dict)  # more columns of its row
    held_bytes: int = 0  # device memory that it keeps between calls, such as a graph's pool


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    shape: Mapping[str, Any]  # the sizes that name the row
    inputs: int  # how many rotate
    expected: Expected
    contenders: Mapping[str, Callable[[], Contender]]  # builders, may raise; the first that is not ours is the baseline
    flops: float | None = None  # that any implementation must do
    bytes: float | None = None  # and move
    fixed: Mapping[str, Any] = field(default_factory=dict)  # device and dtype, by name


@torch.no_grad()
def compete(
    case: Case,
    clock: Clock,
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    profile_to: costs.Folder = None,
    keep: Callable[[Iterable[Row]], None] = lambda rows: None,
) -> list[Row]:
    """A row for each contender, in order. Without a time where it could not run or gave a wrong answer, and why.

    Where one breaks the device, its row says so, and those of all others that this process cannot time them any more.

    `seconds` and `rounds` are those of `interleave`; `profile_to` is a folder for a trace of one more call of each contender; `keep`
    gets what is known before each step that may end the process.
    """
    rows: dict[str, Row] = {}
    running: dict[str, Contender] = {}
    judge = Judge()
    try:
        # Without this the compiler falls back to eager code in silence, and the row would be named after something else.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for name, build in case.contenders.items():
                rows[name] = blank(case, name, UNFINISHED)
                keep(rows.values())
                rows[name], contender = admit(case, name, build, judge)
                if contender is not None:
                    running[name] = contender
            keep(rows.values())
            calls = {name: contender.call for name, contender in running.items()}
            prepare = {name: contender.prepare for name, contender in running.items()}
            timed = interleave(calls, clock, case.inputs, prepare=prepare, seconds=seconds, rounds=rounds)
            for name, contender in running.items():
                rows[name] = settle(case, rows[name], contender, timed[name], judge, profile_to)
    except Broken as last:
        traceback.print_exc()
        culprit, why = last.args[0], cast(BaseException, last)
        while why.__cause__ is not None:
            why = why.__cause__
        lost = {name: blank(case, name, f"{LOST}{culprit}") for name in case.contenders}
        return [*(lost | {culprit: rows[culprit].having(problem=f"{BROKE}{in_one_line(why)}")}).values()]
    torch.compiler.reset()  # variants of one case must not count against the next one's limit
    return list(rows.values())


def blank(case: Case, name: str, problem: str) -> Row:
    return Row(case.name, name, dict(case.shape), problem=problem, **case.fixed)


def admit(case: Case, name: str, build: Callable[[], Contender], judge: Judge) -> tuple[Row, Contender | None]:
    """Builds a contender and holds its first and last input to the truth; returned only where it may be timed."""
    row = blank(case, name, UNFINISHED)
    try:
        contender = build()
        row = row.having(ours=contender.ours, note=contender.note, facts=dict(contender.facts))
        found = worst([
            verdict(case, contender, judge, number, run(contender, number))
            for number in sorted({0, case.inputs - 1})
        ])  # fmt: skip
    except Exception as error:  # the other rows are still worth having
        if broken():
            raise Broken(name) from error
        if isinstance(error, NotRun):
            return row.having(problem=str(error)), None
        traceback.print_exc()  # whose fault it was is not in one line
        return row.having(problem=in_one_line(error)), None
    row = row.having(error=found.error, allowed=found.allowed)
    return (row.having(gate=PASSED), contender) if found.passed else (row.having(gate=FAILED, problem=None), None)


def settle(case: Case, row: Row, contender: Contender, timed: Timed, judge: Judge, profile_to: costs.Folder) -> Row:
    """What the clock saw becomes a time only where it is right: who works for the gate alone is caught here."""
    if timed.problem is not None:
        return row.having(problem=in_one_line(timed.problem))
    try:
        found = verdict(case, contender, judge, timed.number, timed.result)
        if not found.passed:
            return row.having(gate=LATER, error=found.error, allowed=found.allowed, problem=None)
        flops = case.flops if contender.flops is None else contender.flops
        row = row.having(problem=None).timed(timed.milliseconds, flops=flops, bytes=case.bytes)
        row = row.having(facts=row.facts | costs.host_microseconds(functools.partial(contender.call, 0)))
        call = functools.partial(run, contender, 0)
        return row.having(**costs.measure(call, contender.held_bytes, profile_to, f"{case.name} {row.contender}"))
    except Exception as error:  # no memory for the truth of one more input, or for one more call
        if broken():
            raise Broken(row.contender) from error
        return row.having(problem=in_one_line(error))


def verdict(case: Case, contender: Contender, judge: Judge, number: int, result: Any) -> Verdict:
    outputs = contender.view(result, number)
    return judge(contender.expected or case.expected, number, outputs, ours=contender.ours)


def run(contender: Contender, number: int) -> Any:
    contender.prepare(number)
    return contender.call(number)


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")[:200]
