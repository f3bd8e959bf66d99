"""`python -m bench kernels`: measures, prints the table, writes kernels.json."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import environment
from ..job import _prepare_folder, shown
from ..notes import busy_notes
from ..schema import FAILED
from .contenders import COMPILE_MODE, OURS, TIGHT
from .gate import ALLOWED_OVER_PLAIN, ALLOWED_OVER_PLAIN_FOR_RIVALS
from .measure import COPY_BYTES, INPUTS, Bench
from .report import copy_bandwidth, plain_table, problem_lines
from .schema import NOT_RUN, KernelResult, KernelRow
from .settings import Settings

JSON_NAME = "kernels.json"


def main(settings: Settings) -> int:
    """Runs the job; 1 when a contender failed its gate or step_kernels did not run, else 0."""
    started = time.monotonic()
    result = run(settings)
    print(f"total: {time.monotonic() - started:.0f} s")
    # A CPU never runs ours at another capacity.
    own = (OURS,) if torch.device(settings.device).type == "cpu" else (OURS, TIGHT)
    return int(any(row.gate == FAILED or (row.gate == NOT_RUN and row.contender in own) for row in result.rows))


def run(settings: Settings) -> KernelResult:
    """Measures, prints the table and writes the JSON file.

    Raises:
        UsageError: the folder cannot be written to.
    """
    _prepare_folder(settings.out)
    device = torch.device(settings.device)
    facts = environment.describe(device)
    print(environment.one_line(facts))
    print(
        f"width of ViT {settings.model}, {settings.size} px, batch {settings.batch}, {settings.classes} classes, "
        f"{settings.dtype} on {settings.device}",
        flush=True,
    )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():

        def result_of(rows: Sequence[KernelRow]) -> KernelResult:
            return KernelResult(tuple(rows), facts, settings.as_json(), tuple(_notes(settings, facts, rows)))

        # Written after each op: a run that is cut short leaves what it has.
        bench = Bench(settings)
        bench.finished = lambda rows: result_of(rows).write(settings.out / JSON_NAME)
        rows = bench.rows()
    result = result_of(rows)
    print("\n" + plain_table(rows) + "\n")
    for note in (*problem_lines(rows), *result.notes):
        print(f"- {note}")
    result.write(settings.out / JSON_NAME)
    print(f"\nwritten: {shown(settings.out / JSON_NAME)}")
    return result


def _notes(settings: Settings, facts: Mapping[str, Any], rows: Sequence[KernelRow]) -> list[str]:
    notes = [
        f"Layouts leave 2.5 times fewer tokens on average, with a variation of 0.3 between images; {INPUTS[rows[0].device]} inputs with "
        "layouts and data of their own rotate, written anew before every timed call; rounds go forth and back through the contenders "
        "in one process.",
        "MB: each input read once and each output written once, live rows only (1e6 bytes). GB/s: MB / median. "
        f"of copy: over a copy of {COPY_BYTES[rows[0].device] // 2**20} MiB timed in the same rounds"
        f"{copy_bandwidth(rows)} (read and written bytes).",
        "TFLOP/s: of attentions, the two matmuls on the true lengths (4 * sum(L^2) * heads * head_dim, forward + backward "
        "3.5 times that), padding not counted; of linear layers, 2 * M * inputs * outputs on M live rows. What depends on the "
        "lengths or the mask alone (our schedule, the rivals' indices and masks) is built before the clock, as once for all blocks; vs eager is there over the first row below step_kernels.",
        "PyTorch is the fastest of the compositions in bench/kernels/plain.py, plain_exits.py and plain_linear.py that pass the gate, "
        "chosen by a short race before; the compiled one is the same function, in torch.compile's default mode; of linear layers "
        f"on a GPU in the mode {COMPILE_MODE['cuda']}. Attentions have a row for each rival.",
        "The gate holds every output on the first two inputs and the last to the fp64 reference, before the clock and after it; one timed answer of each "
        "contender, chosen at random; then once more an input that has got other numbers in its own memory. It holds "
        f"step_kernels to {ALLOWED_OVER_PLAIN:g} times the rounding error of plain PyTorch, its rivals, whose sums may run in any "
        f"order, to {ALLOWED_OVER_PLAIN_FOR_RIVALS:g} times.",
    ]
    if rows[0].device == "cuda":
        notes.append(
            "Times are the device's, with the inputs out of cache and the host ahead; a contender that waits for the "
            "device pays for that. step_kernels gets untrimmed layouts (static mode: a row for every cell of the patch grids, which is "
            "2.5 times as many as there are live ones but for attentions at other lengths), PyTorch exactly the live rows, whose number it is told. Of a linear layer, capacity M has no rows but the live ones, and is "
            "not told either."
        )
    else:
        notes.append(
            "On a CPU, step_kernels gets exactly the live rows, too; inputs this small may stay in the cache, so a share "
            "of the copy above 100% is possible."
        )
        if any("triton" in (row.floor or "") for row in rows):
            notes.append("Triton runs in its interpreter here: its results are checked, its times mean nothing.")
    return [*notes, *busy_notes(rows[0].device, facts)]
