"""From a comparison to its rows: build, gate, clock, gate again, costs; the most important comparison first, inside a budget."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from step_kernels.model.progress import Progress

from ..compiling import CompileBudget
from ..kernels.contenders import in_one_line
from ..kernels.operation import Unavailable
from ..kernels.schema import NOT_RUN
from ..schema import FAILED, PASSED
from ..timing import Clock, DeviceClock, Timings, interleave
from . import gate, roofline
from .bars import DECIDING
from .budget import Budget, Task
from .case import Case, draw_case, draw_inputs, draw_weights, is_spread
from .costs import measure_costs
from .layouts import SPREAD
from .profile import milliseconds_by_part
from .registry import CONTENDERS, DENSE, EXITS_EXACT, EXITS_STATIC, FRONT, MERGED_EXACT, MERGED_STATIC, Built, Contender
from .schema import ModelRow
from .settings import Settings

BUILDING_SHARE = 0.6  # of a comparison's time may go before the clock; then the less important contenders go without
PROFILED = (DENSE, MERGED_STATIC, EXITS_STATIC, MERGED_EXACT, EXITS_EXACT)
LATER = "right before the clock, wrong after it"
STALE = "right on the inputs of the clock, wrong on one that was turned over after it"


class Bench:
    """What the comparisons of one run share.

    Args:
        settings: of the run.
        contenders: who may take part, in the order of importance; the settings choose among them.


    Attributes:
        rates: what `bench.model.machine.rates` gives; without, rows get no floor.
        finished: gets all rows so far after each comparison.
        profile: milliseconds by part, by contender; filled where the settings ask for it.
        roofline: of each comparison's families, see `bench.model.roofline.as_json`.
    """

    def __init__(self, settings: Settings, contenders: tuple[Contender, ...] = CONTENDERS) -> None:
        device = torch.device(settings.device)
        self.settings = settings
        self.contenders = tuple(one for one in contenders if one.name in settings.contenders)
        self.compiling = CompileBudget(settings.compile_minutes, device)
        self.budget = Budget(settings.minutes, self.compiling)
        self.clock: Clock = DeviceClock(device)
        self.rates: Mapping[str, float] = {}
        self.finished: Callable[[Sequence[ModelRow]], None] = lambda rows: None
        self.profile: dict[str, dict[str, float]] = {}
        self.roofline: dict[str, dict[str, dict[str, float]]] = {}
        self._dense: dict[int, gate.Truths] = {}  # by batch size, of the current model
        self._inputs: tuple[torch.Tensor, ...] = ()

    def rows(self) -> list[ModelRow]:
        """All rows: model by model, the spread layouts of every batch size first."""
        rows: list[ModelRow] = []
        left = self.tasks()
        with Progress("comparisons", len(left)) as progress:
            for position, name in enumerate(self.settings.models):
                if position:
                    torch.compiler.reset()  # else the ninth compilation of one function runs eagerly, with a warning only
                weights = draw_weights(self.settings, name)
                self._dense.clear()
                while left and left[0].model == name:
                    task = left[0]
                    case = draw_case(self.settings, weights, self.inputs(task.batch), task.kind, self.compiling)
                    rows += self.measure(case, self.budget.share(left))
                    del left[0]
                    self.finished(rows)
                    progress.advance(f"ViT {task.model}, batch {task.batch}, {task.kind}")
        return rows

    def tasks(self) -> list[Task]:
        """Every comparison, in the order of importance."""
        return tasks_of(self.settings)

    def inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        """The rotating inputs of one batch size; those of the one before are forgotten."""
        if not self._inputs or self._inputs[0].shape[0] != batch:
            self._inputs = ()  # not both in memory
            self._inputs = draw_inputs(self.settings, batch)
        return self._inputs

    def measure(self, case: Case, seconds: float) -> list[ModelRow]:
        """One comparison in about `seconds`; infinity for no limit."""
        started = self.budget.spent()
        present = [one for one in self.contenders if one.everywhere or is_spread(case)]
        truths = gate.Truths(case, self._dense.get(case.batch))
        self._dense.setdefault(case.batch, truths)
        rows: dict[str, ModelRow] = {}
        ready: dict[str, Built] = {}
        for contender in present:
            over = self.budget.spent() - started > BUILDING_SHARE * seconds
            if contender.everywhere or contender.name in DECIDING:  # as long as there is any budget at all
                over = self.budget.left() <= 0
            problem = "--minutes is used up" if over else None
            row, built = self.prepare(case, contender, truths, problem)
            rows[contender.name] = row
            if built is not None:
                ready[contender.name] = built
        rows |= self.timed(case, ready, truths, rows, seconds - (self.budget.spent() - started))
        ready.clear()
        tidy(case.device)
        baseline = rows.get(DENSE)
        return [compared(row, baseline) for row in rows.values()]

    def prepare(
        self, case: Case, contender: Contender, truths: gate.Truths, problem: str | None = None
    ) -> tuple[ModelRow, Built | None]:
        """Builds and checks one contender; the second is None where it cannot be timed."""
        row = blank_row(case, contender)
        problem = contender.missing(case.device) or problem
        if problem is not None:
            return dataclasses.replace(row, problem=problem), None
        try:
            built = contender.build(case)
            verdict = gate.check(case, contender, built, truths, free=True)
        except Unavailable as reason:
            return dataclasses.replace(row, problem=str(reason)), None
        except Exception as error:  # no memory for it, say; the other rows are still worth having
            tidy(case.device)
            return dataclasses.replace(row, problem=in_one_line(error)), None
        described = dataclasses.replace(
            row, variant=built.variant, compile_seconds=built.compile_seconds, note=built.note
        )
        row = judged(described, verdict)
        return row, built if row.gate == PASSED else None

    def timed(
        self,
        case: Case,
        ready: Mapping[str, Built],
        truths: gate.Truths,
        rows: Mapping[str, ModelRow],
        seconds: float,
    ) -> dict[str, ModelRow]:
        """The rows of those that are ready, with their times; without, if there is no memory for all of them at once, say."""
        if not ready:
            return {}
        own = {one.name: one for one in self.contenders if one.name in ready}
        try:
            timings = self.time(case, ready, seconds)
            wrong = self.wrong_on_others(case, ready)
            return {
                name: self.finish(case, one, ready[name], truths, rows[name], timings[name], wrong.get(name))
                for name, one in own.items()
            }
        except Exception as error:
            problem = f"not timed: {in_one_line(error)}"
            return {name: dataclasses.replace(rows[name], gate=NOT_RUN, problem=problem) for name in own}

    def time(self, case: Case, ready: Mapping[str, Built], seconds: float) -> dict[str, Timings]:
        """Times the contenders, interleaved."""
        repeats = self.settings.repeats
        return interleave(
            {name: built.labels for name, built in ready.items()},
            inputs=len(case.inputs),
            clock=self.clock,
            seconds=None if repeats is not None else max(0.0, seconds),
            rounds=repeats,
            renew=lambda number: case.inputs[number].mul_(1),
        )

    def wrong_on_others(self, case: Case, ready: Mapping[str, Built]) -> dict[str, gate.Verdict]:
        """Verdicts against those who are right on the inputs of the clock and wrong on one that they have not seen."""
        with gate.turned_over(case):
            unseen = gate.Truths(case, only_last=True)
            own = {one.name: one for one in self.contenders if one.name in ready}
            verdicts = {name: gate.check(case, one, ready[name], unseen) for name, one in own.items()}
        return {name: verdict for name, verdict in verdicts.items() if not verdict.passed}

    def finish(
        self,
        case: Case,
        contender: Contender,
        built: Built,
        truths: gate.Truths,
        row: ModelRow,
        timing: Timings,
        wrong: gate.Verdict | None,
    ) -> ModelRow:
        """The row with what the clock says, if the contender is still right after it."""
        if wrong is not None:
            return judged(row, wrong, problem=STALE)
        verdict = gate.check(case, contender, built, truths)
        if not verdict.passed:
            return judged(row, verdict, problem=LATER)
        row = judged(row, verdict)
        costs, events = measure_costs(
            lambda: built.labels(0),
            case.device,
            held_bytes=built.held_bytes,
            profiled=is_spread(case) and (self.settings.profile or case.device.type == "cpu"),
        )
        if events and contender.name in PROFILED:
            self.profile[f"{contender.name}, ViT {row.model}, batch {row.batch}"] = milliseconds_by_part(events)
        return dataclasses.replace(
            self.with_floor(case, row, timing),
            rounds=len(timing.milliseconds),
            median_ms=timing.median,
            p20_ms=timing.p20,
            p80_ms=timing.p80,
            images_per_second=row.batch * 1000 / timing.median,
            teraflops_per_second=row.gflops * row.batch / timing.median,
            **dataclasses.asdict(costs),
        )

    def with_floor(self, case: Case, row: ModelRow, timing: Timings) -> ModelRow:
        """The row with what it must move, and with the least time that takes where the machine's rates are known."""
        work = case.work(row.family)
        row = dataclasses.replace(row, necessary_bytes=round(sum(part.moved_bytes for part in work)))
        if not self.rates:
            return row
        key = f"{row.family}, ViT {row.model}, batch {row.batch}, {row.layout}"
        self.roofline[key] = roofline.as_json(work, self.rates)
        least = roofline.floor_ms(work, self.rates)
        return dataclasses.replace(row, floor_ms=least, achieved=least / timing.median)


def tasks_of(settings: Settings) -> list[Task]:
    """Every comparison, in the order of importance."""
    spread = [kind for kind in settings.layouts if kind == SPREAD]
    others = [kind for kind in settings.layouts if kind != SPREAD]
    first = [Task(model, batch, kind) for model in settings.models for batch in settings.batches for kind in spread]
    # The other kinds at one batch size only: they ask whether the counts matter, not how fast it is.
    then = [Task(model, settings.batches[0], kind) for model in settings.models for kind in others]
    return [task for model in settings.models for task in (*first, *then) if task.model == model]


def blank_row(case: Case, contender: Contender) -> ModelRow:
    """What is known before anything has run."""
    prefix = case.weights.vit.num_prefix
    traces = case.decisions(contender.family)
    counts = [int(length) - prefix for trace in traces for length in trace.layout.lengths()]
    left = sum(int(length) - prefix for trace in traces for length in trace.final_layout.lengths())
    return ModelRow(
        contender=contender.name,
        family=contender.family,
        variant=None,
        model=case.weights.name,
        batch=case.batch,
        layout=case.kind,
        size=case.size,
        device=case.device.type,
        dtype=case.settings.dtype,
        tokens_mean=sum(counts) / len(counts),
        tokens_min=min(counts),
        tokens_max=max(counts),
        halted_share=1 - left / sum(counts),
        gflops=case.gigaflops(contender.family),
        gate=NOT_RUN,
        problem="not yet",
    )


def judged(row: ModelRow, verdict: gate.Verdict, *, problem: str | None = None) -> ModelRow:
    """The row with the gate's verdict; what an earlier verdict says of free runs stays."""
    return dataclasses.replace(
        row,
        gate=PASSED if verdict.passed else FAILED,
        problem=problem,
        decisions_differ=row.decisions_differ if verdict.decisions_differ is None else verdict.decisions_differ,
        max_error=_finite(verdict.max_error),
        allowed_error=_finite(verdict.allowed_error),
        labels_differ=verdict.labels_differ,
    )


def compared(row: ModelRow, dense: ModelRow | None) -> ModelRow:
    """The row with its ratios to the dense one; none for a part of a model, nor where either was not timed."""
    if dense is None or row.family == FRONT:
        return row
    row = dataclasses.replace(row, flop_reduction=dense.gflops / row.gflops)
    if dense.median_ms is None or row.median_ms is None:
        return row
    speedup = dense.median_ms / row.median_ms
    return dataclasses.replace(row, speedup=speedup, realised=speedup * row.gflops / dense.gflops)


def tidy(device: torch.device) -> None:
    """Gives back what contenders held: compiled code, graphs and their memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
