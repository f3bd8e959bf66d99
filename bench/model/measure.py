"""From a comparison to its rows: build, gate, clock, gate again, costs; the most important comparison first, inside a budget."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from step_kernels.model.cli.progress import Progress

from ..compiling import CompileBudget
from ..errors import UsageError
from ..kernels.contenders import in_one_line
from ..kernels.operation import Unavailable
from ..schema import PASSED
from ..timing import Clock, DeviceClock, Timings, interleave
from . import gate, roofline
from .bars import DECIDING
from .budget import Budget, Task, at_every_size, baselines_of, tasks_of
from .case import Case, Weights, draw_case, draw_inputs, draw_weights, is_spread
from .clocking import Raised, Watched, tidy, without_who_raises
from .costs import Costs, Events, measure_costs
from .profile import milliseconds_by_part
from .registry import CONTENDERS, DENSE, EXITS_EXACT, EXITS_STATIC, MERGED_EXACT, MERGED_STATIC, Built, Contender
from .rows import blank_row, compared, judged, not_run, noted
from .schema import NO_COSTS, ModelRow
from .settings import Settings
from .timed import TimedRound, TimedTruths

# Of a comparison's time, what may go before the clock; then the less important contenders go without. But for the first one: it shows
# everybody.
BUILDING_SHARE = 0.6
PROFILED = (DENSE, MERGED_STATIC, EXITS_STATIC, MERGED_EXACT, EXITS_EXACT)
TIMED = "right before the clock, wrong under it"
LATER = "right before the clock, wrong after it"
STALE = "right on the inputs of the clock, wrong on one that was turned over after it"
USED_UP, SHARE_USED_UP = "--minutes is used up", "the comparison's share of --minutes is used up"
NOT_REACHED = "the run ended before"


class Bench:
    """What the comparisons of one run share.

    Args:
        settings: of the run.
        contenders: who may take part, in the order of importance; the settings choose among them.

    Attributes:
        rates: what `bench.model.machine.rates` gives; without, rows get no floor.
        finished: gets all rows so far after each comparison.
        left_out: comparisons that have no rows, and why.
        round: one of the rounds of the last clock, with everybody's answers.
        profile: milliseconds by part, by contender; filled where the settings ask for it.
        roofline: of each comparison's families, see `bench.model.roofline.as_json`.
    """

    round: TimedRound

    def __init__(self, settings: Settings, contenders: tuple[Contender, ...] = CONTENDERS) -> None:
        device = torch.device(settings.device)
        self.settings = settings
        self.contenders = tuple(one for one in contenders if one.name in settings.contenders)
        self.compiling = CompileBudget(settings.compile_minutes, device)
        self.budget = Budget(settings.minutes, self.compiling)
        self.clock: Clock = DeviceClock(device)
        self.rates: Mapping[str, float] = {}
        self.finished: Callable[[Sequence[ModelRow]], None] = lambda rows: None
        self.left_out: dict[Task, str] = {}
        self.profile: dict[str, dict[str, float]] = {}
        self.roofline: dict[str, dict[str, dict[str, float]]] = {}
        self._weights: tuple[str, int | None, Weights] | None = None  # those of one model at one size
        self._dense: dict[int, gate.Answers] = {}  # of the weights, by batch size
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._first = True

    def rows(self) -> list[ModelRow]:
        """All rows, comparison after comparison.

        Raises:
            torch.OutOfMemoryError, UsageError: no comparison could be made at all.
        """
        rows: list[ModelRow] = []
        left = at_every_size(self.tasks(), self.settings.sizes)
        self.left_out = dict.fromkeys(left, NOT_REACHED)
        with Progress("comparisons", len(left)) as progress:
            while left and not (rows and self.budget.left() <= 0):
                try:
                    rows += self.measure(self.case(left), self.budget.share(left))
                    del self.left_out[left[0]]
                except (torch.OutOfMemoryError, UsageError) as error:
                    if not rows and len(left) == 1:
                        raise
                    self.left_out[left[0]] = in_one_line(error)
                tidy(torch.device(self.settings.device))  # what contenders held, and an error
                progress.advance(str(left.pop(0)))
                self.finished(rows)
        self.left_out |= dict.fromkeys(left, USED_UP)
        return rows

    def tasks(self) -> list[Task]:
        """Every comparison, in the order of importance."""
        return tasks_of(self.settings)

    def case(self, tasks: Sequence[Task]) -> Case:
        """That of the first task, with the weights and inputs of the one before where they are the same."""
        task = tasks[0]
        weights = self.weights(task.model, task.size)
        if any(one.name == DENSE for one in self.contenders):
            compiled = {(task.model, task.size, batch) for batch in self._dense}  # for other layouts
            self.compiling.baselines_to_come = len(baselines_of(tasks) - compiled)
        return draw_case(self.settings, weights, self.inputs(task.batch, task.size), task.kind, self.compiling)

    def weights(self, model: str, size: int | None) -> Weights:
        """Those of one model at one size, with what was compiled for them; those of the ones before are forgotten."""
        if self._weights is None or self._weights[:2] != (model, size):
            if self._weights is not None:
                self._weights = None
                self._dense.clear()
                tidy(torch.device(self.settings.device))  # not both in memory
                torch.compiler.reset()  # else the ninth compilation of one function runs eagerly, with a warning only
            self._weights = (model, size, draw_weights(self.settings, model, size))
        return self._weights[2]

    def inputs(self, batch: int, size: int | None) -> tuple[torch.Tensor, ...]:
        """The rotating inputs of one batch size and size; those of the ones before are forgotten."""
        if not self._inputs or (self._inputs[0].shape[0], self._inputs[0].shape[-1]) != (batch, size):
            self._inputs = ()  # not both in memory
            self._inputs = draw_inputs(self.settings, batch, size)
        return self._inputs

    def measure(self, case: Case, seconds: float) -> list[ModelRow]:
        """One comparison in about `seconds`; infinity for no limit."""
        started = self.budget.spent()
        present, first = [one for one in self.contenders if one.everywhere or is_spread(case)], self._first
        self._first = False
        answers = gate.Answers.of(case, self._dense.get(case.batch))
        rows = {one.name: blank_row(case, one) for one in present}  # all of them before anybody can break the device
        ready: dict[str, Built] = {}
        for contender in present:
            problem = USED_UP if self.budget.left() <= 0 else None
            important = first or contender.everywhere or contender.name in DECIDING
            if not important and self.budget.spent() - started > BUILDING_SHARE * seconds:
                problem = problem or SHARE_USED_UP
            row, built = self.prepare(case, contender, rows[contender.name], answers, problem)
            rows[contender.name] = row
            if built is not None:
                ready[contender.name] = built
            del built  # `ready` alone holds it, so that it can be given up
        if DENSE in ready:  # for other layouts, which are all the same to it
            self._dense.setdefault(case.batch, answers)
        rows |= self.timed(case, ready, answers, rows, seconds - (self.budget.spent() - started))
        baseline = rows.get(DENSE)
        return [compared(row, baseline) for row in rows.values()]

    def prepare(
        self, case: Case, contender: Contender, row: ModelRow, answers: gate.Answers, problem: str | None = None
    ) -> tuple[ModelRow, Built | None]:
        """Builds and checks one contender, whose row is blank so far; the second is None where it cannot be timed."""
        problem = contender.missing(case.device) or problem
        if problem is not None:
            return not_run(row, problem), None
        try:
            answers.ask(case, contender.family)
            built = contender.build(case)
            verdict = gate.check(case, contender, built, answers.seen, free=True)
        except Unavailable as reason:
            return not_run(row, str(reason)), None
        except Exception as error:  # no memory for it, say; the other rows are still worth having
            row = not_run(row, in_one_line(error))
        else:
            described = dataclasses.replace(
                row, variant=built.variant, compile_seconds=built.compile_seconds, note=built.note
            )
            row = judged(described, verdict)
            return row, built if row.gate == PASSED else None
        tidy(case.device)  # now that the error holds nothing any more
        return row, None

    def timed(
        self,
        case: Case,
        ready: dict[str, Built],
        answers: gate.Answers,
        rows: Mapping[str, ModelRow],
        seconds: float,
    ) -> dict[str, ModelRow]:
        """The rows of those that are ready, with their times; who raises has none, and the others are timed without it."""
        stop = self.budget.spent() + seconds
        timings, problems = without_who_raises(
            ready, lambda: self.time(case, ready, stop - self.budget.spent()), case.device
        )
        if not ready:
            return {name: not_run(rows[name], problem) for name, problem in problems.items()}
        timed = TimedTruths(case, self.round, answers.seen)
        own = {one.name: one for one in self.contenders}
        made = {name: not_run(rows[name], problem) for name, problem in problems.items()}
        for name, built in ready.items():
            made[name] = self.finish(case, own[name], built, answers, timed, rows[name], timings[name])
        return made

    def time(self, case: Case, ready: Mapping[str, Built], seconds: float) -> dict[str, Timings]:
        """Times the contenders, interleaved; `round` is then one of the rounds.

        Raises:
            Raised: from what one of them has raised.
        """
        repeats = self.settings.repeats
        watched = Watched(ready)
        self.round = TimedRound(case.inputs, len(watched.calls))
        try:
            return interleave(
                watched.calls,
                inputs=len(case.inputs),
                clock=self.clock,
                seconds=None if repeats is not None else max(0.0, seconds),
                rounds=repeats,
                renew=self.round.write,
                keep=self.round.keep,
            )
        except Exception as error:
            raise Raised(watched.running) from error
        finally:
            with contextlib.suppress(RuntimeError):  # of a device that is broken; what broke it is the error to tell
                self.round.restore()

    def finish(
        self,
        case: Case,
        contender: Contender,
        built: Built,
        answers: gate.Answers,
        timed: TimedTruths,
        row: ModelRow,
        timing: Timings,
    ) -> ModelRow:
        """The row with what the clock says, if the contender was right under it and still is, on an input that it has not seen, too."""
        try:
            under = timed.check(contender)
            if not under.passed:
                return judged(row, under, problem=TIMED)
            with gate.turned_over(case):
                stale = gate.check(case, contender, built, answers.unseen)
            if not stale.passed:
                return judged(row, stale, problem=STALE)
            verdict = gate.check(case, contender, built, answers.seen)
        except Exception as error:  # a time without a verdict is none
            return not_run(row, f"not checked after the clock: {in_one_line(error)}")
        if not verdict.passed:
            return judged(row, verdict, problem=LATER)
        costs, events, lacking = self.costs(case, built)
        if events and contender.name in PROFILED:
            name = f"{contender.name}, ViT {row.model}, {row.size} px, batch {row.batch}"
            self.profile[name] = milliseconds_by_part(events)
        return dataclasses.replace(
            self.with_floor(case, noted(judged(row, verdict), lacking), timing),
            **timing.fields(),
            images_per_second=row.batch * 1000 / timing.median,
            teraflops_per_second=row.gflops * row.batch / timing.median,
            **dataclasses.asdict(costs),
        )

    def costs(self, case: Case, built: Built) -> tuple[Costs, Events, str | None]:
        """What a call costs, and why something is not known: a time is worth having without it."""
        wanted = is_spread(case) and (self.settings.profile or case.device.type == "cpu")
        lacking = None
        for profiled in dict.fromkeys((wanted, False)):
            try:
                call = functools.partial(built.labels, 0)
                costs, events = measure_costs(call, case.device, held_bytes=built.held_bytes, profiled=profiled)
            except Exception as error:  # the profiler's, say
                lacking = f"{NO_COSTS}: {in_one_line(error)}"
            else:
                return costs, events, lacking
        return Costs(), [], lacking

    def with_floor(self, case: Case, row: ModelRow, timing: Timings) -> ModelRow:
        """The row with what it must move, and with the least time that takes where the machine's rates are known."""
        work = case.work(row.family)
        row = dataclasses.replace(row, necessary_bytes=round(sum(part.moved_bytes for part in work)))
        if not self.rates:
            return row
        key = f"{row.family}, ViT {row.model}, {row.size} px, batch {row.batch}, {row.layout}"
        self.roofline[key] = roofline.as_json(work, self.rates)
        least = roofline.floor_ms(work, self.rates)
        return dataclasses.replace(row, floor_ms=least, achieved=least / timing.median)
