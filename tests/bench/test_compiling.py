"""The budget of torch.compile, where it is so small that the compiler itself is hardly loaded in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import compiling
from bench.compiling import CompileBudget, stop_workers
from bench.environment import REPOSITORY
from bench.kernels.contenders import OutOfTime

PROGRAM = """
import torch
from bench.compiling import CompileBudget
for tenths in range(1, 12):
    budget = CompileBudget(tenths / 600, torch.device("cpu"))
    budget.spend(lambda: torch.compile(lambda x: x.sin().sum(0), backend="eager")(torch.ones(8, 8)))
torch.compiler.reset()
print(CompileBudget(1.0, torch.device("cpu")).spend(lambda: torch.compile(torch.sin, backend="eager")(torch.ones(8))))
"""

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, for a budget whose calls take as long as they say."""
    now = [1000.0]
    monkeypatch.setattr(compiling, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(compiling, "_load_compiler", lambda: None)
    return now


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time limits that were set."""
    found: list[float] = []

    class Limit:
        def __init__(self, seconds: float) -> None:
            found.append(seconds)

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(compiling, "time_limit", Limit)
    return found


def lasts(clock: list[float], seconds: float) -> Callable[[], None]:
    def call() -> None:
        clock[0] += seconds

    return call


def cut_short() -> None:
    raise OutOfTime


def broken() -> None:
    raise RuntimeError("no compiler here")


def test_baselines_that_are_still_to_come_keep_what_one_has_taken(clock: list[float], limits: list[float]) -> None:
    budget = CompileBudget(6.0, CPU)
    budget.baselines_to_come = 3
    assert budget.spend(lasts(clock, 100), baseline=True) is None
    assert budget.spend(lasts(clock, 10)) is None
    assert budget.spend(cut_short) == (
        "not compiled in what was left of --compile-minutes 6, less what the dense models to come will need"
    )
    assert budget.spend(lasts(clock, 1), baseline=True) is None
    assert limits == [360, 60, 50, 250]


def test_others_get_what_the_baselines_leave(clock: list[float], limits: list[float]) -> None:
    budget = CompileBudget(5.0, CPU)
    budget.baselines_to_come = 2
    assert budget.spend(lasts(clock, 10)) is None  # nothing is known yet
    assert budget.spend(lasts(clock, 80), baseline=True) is None
    assert budget.spend(lasts(clock, 30)) is None
    assert budget.spend(lasts(clock, 60), baseline=True) is None
    assert budget.spend(lasts(clock, 20)) is None
    assert limits == [300, 290, 130, 180, 120]
    assert budget.spent == 200 and budget.baselines_to_come == 0


def test_who_finds_the_budget_used_up_is_told_by_whom(clock: list[float], limits: list[float]) -> None:
    budget = CompileBudget(5.0, CPU)
    budget.baselines_to_come = 2
    budget.spend(lasts(clock, 200), baseline=True)
    kept = "not compiled: --compile-minutes 5, less what the dense models to come will need, is used up"
    assert budget.spend(lasts(clock, 1)) == kept
    assert budget.spend(lasts(clock, 101), baseline=True) is None
    for baseline in (True, False):
        assert budget.spend(lasts(clock, 1), baseline=baseline) == "not compiled: --compile-minutes 5 is used up"
    assert limits == [300, 100]
    assert CompileBudget(0.0, CPU).spend(broken) == "not compiled: --compile-minutes 0 is used up"


def test_workers_are_stopped_when_a_compilation_is_cut_short_and_only_then(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[float] = []

    def stop() -> None:
        stopped.append(clock[0])
        clock[0] += 4

    monkeypatch.setattr(compiling, "stop_workers", stop)
    budget = CompileBudget(5.0, CPU)
    assert budget.spend(lasts(clock, 20)) is None
    assert budget.spend(broken) == "torch.compile: RuntimeError: no compiler here"
    assert stopped == []
    assert budget.spend(cut_short) == "not compiled in what was left of --compile-minutes 5"
    assert stopped == [1020.0]
    assert budget.spent == 24  # the time for it is no contender's


def test_workers_that_cannot_be_stopped_are_named(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "stop_workers", broken)
    assert CompileBudget(5.0, CPU).spend(cut_short) == (
        "not compiled in what was left of --compile-minutes 5; its worker processes could not be stopped, "
        "times after it may suffer: RuntimeError: no compiler here"
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="workers are found through /proc")
def test_the_compilers_own_workers_end_at_once() -> None:
    """Jobs that still run or wait are given up, in torch 2.11 too, whose own shutdown waits for them."""
    from torch._inductor import async_compile, config

    with config.patch(compile_threads=2):
        before = async_compile.AsyncCompile.process_pool()
        assert before.submit(abs, -1).result(120) == 1
        workers = compiling._children_of(before.process.pid)
        jobs = [before.submit(time.sleep, 60) for _ in range(4)]
        async_compile.CompiledTritonKernels.save("kernel", jobs[0])
        started = time.monotonic()
        stop_workers()
        assert time.monotonic() - started < 30  # of the 120 that the jobs would take
        assert before.process.poll() is not None
        assert workers and not any(os.path.exists(f"/proc/{worker}") for worker in workers)
        assert all(job.exception(0) is not None for job in jobs)
        assert async_compile.CompiledTritonKernels.get("kernel") is None
        assert before not in async_compile._pool_set


def test_a_compiler_that_is_cut_short_can_still_be_reset() -> None:
    """In a process of its own: here the compiler may be loaded already."""
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "None\n"
