"""`python -m bench model`: measures, prints the table, writes model.json."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import environment
from ..gate import ALLOWED_OVER_PLAIN
from ..job import _prepare_folder, shown
from ..kernels.gate import ALLOWED_OVER_PLAIN_FOR_RIVALS
from ..notes import busy_notes
from ..schema import FAILED
from . import gate, machine, profile, realistic
from .bars import bars
from .layouts import REALISTIC
from .measure import Bench
from .report import bar_lines, free_lines, left_out_lines, note_lines, plain_table, problem_lines
from .schema import ModelResult, ModelRow
from .settings import Settings

JSON_NAME = "model.json"


def main(
    settings: Settings, make: Callable[[Settings], Bench] = Bench, name: str = JSON_NAME, more: Sequence[str] = ()
) -> int:
    """`run` and how long it took; 1 when a contender failed its gate, else 0."""
    started = time.monotonic()
    result = run(settings, make, name, more)
    print(f"total: {time.monotonic() - started:.0f} s")
    return int(any(row.gate == FAILED for row in result.rows))


def run(
    settings: Settings, make: Callable[[Settings], Bench] = Bench, name: str = JSON_NAME, more: Sequence[str] = ()
) -> ModelResult:
    """Measures, prints the table and writes the JSON file.

    Args:
        settings: of the run.
        make: the comparisons.
        name: of the file.
        more: notes on top of those that hold for every run.

    Raises:
        UsageError: the folder cannot be written to.
    """
    _prepare_folder(settings.out)
    device = torch.device(settings.device)
    facts = environment.describe(device)
    print(environment.one_line(facts))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        rates = machine.rates(device, settings.dtype)
        print(
            f"a copy reaches {rates['copy_gigabytes_per_second']:.0f} GB/s, a matmul in {settings.dtype} "
            f"{rates['matmul_teraflops_per_second']:.3g} TFLOP/s",
            flush=True,
        )
        bench = make(settings)

        def result_of(rows: Sequence[ModelRow]) -> ModelResult:
            notes = (*_notes(settings, facts, rows, bench), *more, *left_out_lines(bench.left_out))
            return ModelResult(tuple(rows), facts, settings.as_json(), notes, rates, bench.profile, bench.roofline)

        # Written after each comparison: a run that is cut short leaves what it has.
        bench.rates, bench.finished = rates, lambda rows: result_of(rows).write(settings.out / name)
        rows = bench.rows()
    result = result_of(rows)
    print("\n" + plain_table(rows) + "\n")
    lines = [
        *problem_lines(rows),
        *free_lines(rows),
        *note_lines(rows),
        *profile.profile_lines(bench.profile),
        *result.notes,
    ]
    for line in (*lines, *bar_lines(bars(rows))):
        print(f"- {line}")
    result.write(settings.out / name)
    print(f"\nwritten: {shown(settings.out / name)}")
    return result


def _notes(settings: Settings, facts: Mapping[str, Any], rows: Sequence[ModelRow], bench: Bench) -> list[str]:
    truth = str(gate.truth_dtype(torch.device(settings.device))).removeprefix("torch.")
    notes = [
        f"Weights, images ({settings.inputs} inputs that rotate, no two images alike) and layouts are random (seed {settings.seed}); every "
        "contender repeats the same recorded decisions; rounds go forth and back through the contenders in one process.",
        "Merged contenders ask a policy network each time and drop its answer; every time includes the output tail (labels at image "
        "size): upsample_argmax in ours, interpolate + argmax in PyTorch's.",
        "Times are wall time, the host's work included. GFLOPs: matmuls and convolutions, attention's two matmuls counted, 1 MAC = 2 "
        "FLOPs, without the tail. realised = speed-up / fewer FLOPs. of floor: the least time at the rates of a copy and of a matmul here, part "
        "by part, over the median.",
        f"The gate holds scores and labels to the dense oracle in {truth}, before the clock and after it: ours to {ALLOWED_OVER_PLAIN:g} "
        f"times the rounding error of plain PyTorch, the others to {ALLOWED_OVER_PLAIN_FOR_RIVALS:g} times. Up to {gate.IMAGES} images of "
        f"{min(gate.INPUTS, settings.inputs)} inputs are compared, and after the clock one input that is turned over in its own memory. "
        "Under the clock inputs have their colours exchanged and their brightness changed at random in every round, and one image of one round's "
        "answers, drawn at random, is compared, too: a kept answer is a wrong one. A capture returns labels only: its row's scores are those of the "
        "same code without the graph.",
    ]
    without_photographs = realistic.source() if REALISTIC in settings.layouts else None
    if without_photographs is not None:
        notes.append(without_photographs)
    if bench.profile:
        notes.append(profile.NOTES[torch.device(settings.device).type])
    if settings.device == "cpu":
        notes.append("Small inputs on a CPU: these times check that the comparison runs; they say nothing about a GPU.")
    return [*notes, *busy_notes(settings.device, facts)]
