"""One kernel's candidates: who is right, who is fastest, and the file that says so (read by ``triton/common/tuned.py``)."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import selfcheck
from ..backend import use_backend
from ..extras import shown
from ..files import replacing
from ..triton.common import tuned
from ..triton.common.tuned import Row

GAIN = 0.98  # of the default's time, above which it stays: two runs of one kernel differ by as much
ROUNDS, LEAST_ROUNDS = 20, 5  # with time, and in any case
Outputs = tuple[Tensor, ...]
Clock = Callable[[Callable[[], Any]], float]  # milliseconds of one call


@dataclass(frozen=True)
class Work:
    """One kernel at one size of the model."""

    key: str  # in the file
    candidates: Sequence[Row]  # the first is what runs without a file
    call: Callable[[torch.dtype], Outputs]  # with inputs of this dtype, the same numbers in each
    what: str = ""  # sizes, for people


@dataclass
class Found:
    """What became of one kernel's candidates."""

    work: Work
    milliseconds: dict[Row, float] = field(default_factory=dict)  # median of each right one
    refused: dict[Row, str] = field(default_factory=dict)

    @property
    def best(self) -> Row:
        default, times = self.work.candidates[0], self.milliseconds
        fastest = min(times, key=times.__getitem__, default=default)
        slow = default in times and times[fastest] > GAIN * times[default]
        return default if slow else fastest


def device_clock(call: Callable[[], Any]) -> float:
    """Median of some 20 ms of calls, each with a cold L2 cache, as a graph: what a call costs the host does not count."""
    from triton.testing import do_bench

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return float(do_bench(graph.replay, warmup=2, rep=20, return_mode="median"))


def measure(work: Work, dtype: torch.dtype, clock: Clock, seconds: float) -> Found:
    """Drop who is wrong, raises or does not fit; time the others in turns, forwards and backwards, for at most about so long."""
    found, end = Found(work), time.monotonic() + seconds
    with use_backend("reference"):
        plain, exact = work.call(dtype), work.call(torch.float64)
    for row in work.candidates:
        with tuned.forced(work.key, row):
            outcome = selfcheck.attempt(work.key, lambda: selfcheck.worst(work.call(dtype), plain, exact, dtype))
        if not outcome.passed:
            found.refused[row] = outcome.raised or f"error {outcome.error:.3g}, allowed {outcome.bound:.3g}"
    alive = [row for row in work.candidates if row not in found.refused]
    times: dict[Row, list[float]] = {row: [] for row in alive}
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for row in alive:
            with tuned.forced(work.key, row):
                times[row].append(clock(functools.partial(work.call, dtype)))
        alive.reverse()
    found.milliseconds = {row: statistics.median(taken) for row, taken in times.items()}
    return found


def write(path: Path, gpu: str, found: Found) -> None:
    """Put one kernel's row in the file, beside those of other kernels and GPUs; the old file is there until the new one is whole."""
    gpus = tuned.read(path) if path.exists() else {}
    entry = gpus.get(gpu)
    if entry is None or entry["made_for"] != tuned.made_for():
        entry = gpus[gpu] = {"made_for": tuned.made_for(), "torch": torch.__version__, "rows": {}, "measured": {}}
    best = found.best
    if best in found.milliseconds:
        entry["rows"][found.work.key] = list(best)
    entry["measured"][found.work.key] = {
        "sizes": found.work.what,
        "default": list(found.work.candidates[0]),
        "milliseconds": [[list(row), taken] for row, taken in found.milliseconds.items()],
        "refused": [[list(row), why] for row, why in found.refused.items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps({"format": tuned.FORMAT, "gpus": gpus}, indent=1), encoding="utf-8")
    tuned.rows.cache_clear()  # the next kernels are measured beside the best of these


def tune(works: list[Work], device: torch.device, dtype: torch.dtype, seconds: float, clock: Clock, path: Path) -> int:
    """Each kernel in an equal share of the time that is left; what was found is in the file, whatever happens next."""
    gpu = torch.cuda.get_device_name(device)
    end, status = time.monotonic() + seconds, 0
    print(f"{'kernel':44} {'default':>10} {'best':>10}   row")
    try:
        for number, work in enumerate(shown(works, "kernels", unit="")):
            if (left := end - time.monotonic()) < 0:
                print(f"{work.key:44} not measured: out of time")
                continue
            found = measure(work, dtype, clock, left / (len(works) - number))
            write(path, gpu, found)
            print("\n".join(_lines(found)), flush=True)
            status |= not found.milliseconds
    except KeyboardInterrupt:
        print("stopped: what is above is written, the other kernels stay as they were")
        status = 130
    if path.exists():
        print(f"written: {path}")
    return status


def _lines(found: Found) -> Iterable[str]:
    """Times of the default and the best; why candidates were left out."""
    default, best = found.work.candidates[0], found.best
    times = [
        f"{found.milliseconds[row] * 1e3:.1f} us" if row in found.milliseconds else "failed" for row in (default, best)
    ]
    yield f"{found.work.key:44} {times[0]:>10} {times[1]:>10}   {'the default' if best == default else best}"
    for row, why in found.refused.items():
        yield f"    left out: {row}: {why.splitlines()[0][:150]}"
