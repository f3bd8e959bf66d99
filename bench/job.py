"""The main job: photographs, one model, the gate, the clock, one table."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from step_kernels.model.cli.progress import Progress

from . import environment, gate
from .case import Case, build_case
from .draw import blocks_of, draw_supertokens
from .errors import UsageError
from .images import load_photographs
from .model import machine, roofline
from .model.costs import Costs, measure_costs
from .model.profile import NOTES, milliseconds_by_part, profile_lines
from .notes import BASELINE, busy_notes, notes_of
from .providers import Contender, build_contenders, tail_alone
from .renewal import Answer, Renewed
from .report import gate_line, plain_table
from .schema import FAILED, PASSED, Result, Row
from .settings import DEFAULT_BATCH, PATCH_SIZE, Settings
from .timing import DeviceClock, Timings, interleave

JSON_NAME, PICTURE_NAME = "bench.json", "supertokens.png"
TAIL = "tail alone"


def run(settings: Settings) -> Result:
    """Runs the comparison, prints it, and writes the JSON file and the picture.

    Raises:
        UsageError: something that was asked cannot be done; nothing has been written by then.
    """
    photographs = load_photographs(settings.images, size=settings.size, batch=settings.batch, most=DEFAULT_BATCH)
    _prepare_folder(settings.out)
    for message in photographs.messages:
        print(message, file=sys.stderr)
    settings = dataclasses.replace(settings, batch=len(photographs.names))
    facts = environment.describe(torch.device(settings.device))
    print(environment.one_line(facts))
    print(
        f"ViT {settings.model}, {settings.size} px, batch {settings.batch}, {settings.dtype} on {settings.device}; "
        f"photographs: {', '.join(photographs.names)}",
        flush=True,
    )
    case = build_case(settings, photographs)
    contenders = build_contenders(case)
    result = result_of(case, facts, measure(case, contenders, print_line=print))
    result.write(settings.out / JSON_NAME)  # a run that is cut short in what follows has its times
    result = with_all_costs(result, case, contenders)
    print("\n" + plain_table(result.rows) + "\n")
    for note in (*profile_lines(result.profile), *result.notes):
        print(f"- {note}")
    result.write(settings.out / JSON_NAME)
    print(f"\nwritten: {shown(settings.out / JSON_NAME)}{_write_picture(case, contenders[-1])}")
    return result


def result_of(case: Case, facts: dict[str, object], rows: Sequence[Row]) -> Result:
    """What the gate and the clock say."""
    settings = case.settings
    pictures = {"images": "generated"} if case.photographs.generated else {}
    asked = {**settings.as_json(), **pictures, "inputs": len(case.inputs), **case.calibrated()}
    notes = [
        *notes_of(case, rows),
        *busy_notes(settings.device, facts),
        *case.photographs.messages[: case.photographs.generated],
    ]
    return Result(tuple(rows), facts, asked, tuple(notes))


def with_all_costs(result: Result, case: Case, contenders: Sequence[Contender]) -> Result:
    """The result with what the calls cost beside time, and the machine's rates, both measured after the clock."""
    rates = machine.rates(torch.device(case.settings.device), case.settings.dtype)
    profile: dict[str, dict[str, float]] = {}
    floors: dict[str, dict[str, dict[str, float]]] = {}
    finished = []
    for row, contender in zip(result.rows, contenders, strict=True):
        if row.gate == PASSED:
            work = work_of_contender(case, contender)
            floors[row.provider] = roofline.as_json(work, rates)
            costs, events = measure_costs(
                functools.partial(_labels, case, contender, 0), case.inputs[0].device, profiled=True
            )
            if events:
                profile[row.provider] = milliseconds_by_part(events)
            row = with_costs(row, costs, work, rates)
        finished.append(row)
    notes = (*result.notes, NOTES[case.inputs[0].device.type]) if profile else result.notes
    return dataclasses.replace(
        result, rows=tuple(finished), notes=notes, machine=rates, profile=profile, roofline=floors
    )


def work_of_contender(case: Case, contender: Contender) -> tuple[roofline.Work, ...]:
    """The mean over the inputs; a policy whose layouts are given does no work."""
    pairs = zip(case.inputs, contender.traces, strict=True)
    work = roofline.mean_work([roofline.work_of(contender.model, images, trace) for images, trace in pairs])
    given = case.settings.policy == "given"
    return tuple(part for part in work if not (given and part.part == roofline.POLICY))


def with_costs(row: Row, costs: Costs, work: Sequence[roofline.Work], rates: Mapping[str, float]) -> Row:
    """The row with what a call costs beside time and the least time it can take."""
    least = roofline.floor_ms(work, rates)
    return dataclasses.replace(
        row,
        **dataclasses.asdict(costs),
        necessary_bytes=round(sum(part.moved_bytes for part in work)),
        floor_ms=least,
        achieved=None if row.median_ms is None else least / row.median_ms,
    )


def measure(case: Case, contenders: Sequence[Contender], *, print_line: Callable[[str], None]) -> list[Row]:
    """Gate first, then the clock for those that passed; one row per contender, in their order."""
    verdicts, rows = {}, {}
    drawn = gate.draw_images(len(case.inputs), case.inputs[0].shape[0])  # for all of them
    with Progress("checking", 2 * len(contenders) * len(case.inputs)) as progress:
        for contender in contenders:
            verdicts[contender.name] = gate.check(contender, case.inputs, compared=drawn, advance=progress.advance)
    for contender in contenders:
        rows[contender.name] = _untimed_row(case, contender, verdicts[contender.name])
        print_line(gate_line(rows[contender.name]))
    passed = [contender for contender in contenders if verdicts[contender.name].passed]
    if passed:
        timings, answers = _time(case, passed)
        for contender in passed:
            rows[contender.name] = with_timing(rows[contender.name], timings[contender.name], timings[TAIL])
            plain_error = verdicts[contender.name].plain_error
            verdict = gate.check_timed(contender, case.inputs, answers[contender.name], plain_error=plain_error)
            if not verdict.passed:
                rows[contender.name] = _untimed_row(case, contender, verdict)
                print_line(f"after the clock, an answer that was timed: {gate_line(rows[contender.name])}")
    baseline = rows.get(BASELINE)
    return [compared(row, baseline) for row in rows.values()]


def with_timing(row: Row, timing: Timings, tail: Timings) -> Row:
    """The row with what the clock says."""
    return dataclasses.replace(
        row,
        **timing.fields(),
        images_per_second=row.batch * 1000 / timing.median,
        tail_ms=tail.median,
    )


def compared(row: Row, baseline: Row | None) -> Row:
    """The row with its ratios to the baseline; none where either failed its gate or was not timed."""
    if baseline is None or baseline.median_ms is None or row.median_ms is None:
        return row
    own, other, tail = row.median_ms, baseline.median_ms, row.tail_ms
    flop_reduction = baseline.gflops / row.gflops
    without_tail = None if tail is None or tail >= min(own, other) else (other - tail) / (own - tail)
    return dataclasses.replace(
        row,
        speedup=other / own,
        flop_reduction=flop_reduction,
        realised=other / own / flop_reduction,
        realised_without_tail=None if without_tail is None else without_tail / flop_reduction,
    )


def _untimed_row(case: Case, contender: Contender, verdict: gate.Verdict) -> Row:
    settings, images = case.settings, case.inputs[0]
    prefix = case.vit.num_prefix
    counts = [int(length) - prefix for trace in contender.traces for length in trace.layout.lengths()]
    left = sum(int(length) - prefix for trace in contender.traces for length in trace.final_layout.lengths())
    flops = sum(part.flops for part in work_of_contender(case, contender))
    return Row(
        provider=contender.name,
        device=torch.device(settings.device).type,
        dtype=settings.dtype,
        model=settings.model,
        size=settings.size,
        batch=images.shape[0],
        tokens_mean=sum(counts) / len(counts),
        tokens_min=min(counts),
        tokens_max=max(counts),
        halted_share=1 - left / sum(counts),
        gflops=flops / images.shape[0] / 1e9,
        gate=PASSED if verdict.passed else FAILED,
        max_error=_finite(verdict.max_error),
        allowed_error=_finite(verdict.allowed_error),
        labels_differ=verdict.labels_differ,
        decisions_differ=verdict.decisions_differ,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _time(case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timings], dict[str, Answer]]:
    """Times the contenders, and the shared tail alone under the name `TAIL`; and one timed answer of each contender."""
    calls: dict[str, Callable[[int], object]] = {
        contender.name: functools.partial(_labels, case, contender) for contender in contenders
    }
    calls[TAIL] = tail_alone(case, contenders[-1])  # the quickest one
    seconds = None if case.settings.minutes is None else case.settings.minutes * 60
    rounds, started = case.settings.repeats, time.monotonic()
    title, total = ("timing (seconds)", round(seconds)) if seconds else ("timing (calls)", (rounds or 0) * len(calls))
    renewed = Renewed(case.inputs)
    with Progress(title, max(total, 1)) as progress:

        def advance(name: str) -> None:
            progress.reach(round(time.monotonic() - started) if seconds else progress.done + 1, name)

        timings = interleave(
            calls,
            inputs=len(case.inputs),
            clock=DeviceClock(case.inputs[0].device),
            seconds=seconds,
            rounds=rounds,
            advance=advance,
            renew=renewed.write,
            keep=renewed.keep,
        )
    renewed.restore()
    return timings, renewed.answers


def _labels(case: Case, contender: Contender, number: int) -> torch.Tensor:
    return contender.labels(case.inputs[number], contender.traces[number])


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--out {folder} cannot be written to")


def _write_picture(case: Case, contender: Contender) -> str:
    """Draws the decisions of the contender with the most of them; without matplotlib the run is complete all the same."""
    path = case.settings.out / PICTURE_NAME
    try:
        draw_supertokens(
            path,
            case.photographs.pixels,
            case.photographs.names,
            blocks_of(contender.traces[0]),
            grid=case.settings.size // PATCH_SIZE,
            exits=[stage.block for stage in contender.traces[0].stages],
        )
    except UsageError as missing:
        return f" (no picture: {missing})"
    return f", {shown(path)}"


def shown(path: Path) -> str:
    """A path as the reader would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def main(settings: Settings) -> int:
    """Runs the job; 1 when a contender failed its gate, else 0."""
    started = time.monotonic()
    result = run(settings)
    print(f"total: {time.monotonic() - started:.0f} s")
    return int(any(row.gate == FAILED for row in result.rows))
