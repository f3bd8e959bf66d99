"""The parts of the suite, in the order of importance, and the command line that keeps each inside its seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from ..evidence.results import KERNELS, MAIN, MODEL, PEERS, PROFILE
from ..model.measure import PROFILED
from .gpu_tests import JSON_NAME as GPU_TESTS_JSON

GPU_TESTS = "gpu tests"
Command = Callable[[float], list[str]]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: on the command line.
        weight: its part of the budget relative to those that are left.
        arguments: seconds -> what follows `python -m`, without device and folder.
        needs: packages that it cannot run without, beyond those of the package.
        folder: below the suite's.
        writes: the file of results, from the suite's folder.
        bars: the numbers of those that its results decide.
    """

    name: str
    weight: float
    arguments: Command
    needs: tuple[str, ...] = ()
    folder: str = "."
    writes: str = ""
    bars: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        lacking = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"needs {', '.join(lacking)}: pip install {' '.join(lacking)}" if lacking else None


def _minutes(seconds: float) -> str:
    return f"{max(seconds, 1.0) / 60:.3f}"


def _compiled(name: str, *more: str, start: float, timed: float, compiling: float) -> Command:
    """A job whose --minutes and --compile-minutes share what its start (and, of kernels, the gate) leaves."""

    def arguments(seconds: float) -> list[str]:
        left = seconds - start
        compile_minutes = _minutes(compiling * left) if compiling else "0"
        budgets = ["--minutes", _minutes(timed * left), "--compile-minutes", compile_minutes]
        return ["bench", name, *more, *budgets]

    return arguments


def _main_job(start: float) -> Command:
    """Start, gate and costs take `start` seconds on an idle machine; the clock gets the rest."""
    return lambda seconds: ["bench", "--policy", "given", "--minutes", _minutes(seconds - start)]


def _gpu_tests(seconds: float) -> list[str]:
    return ["bench.suite.gpu_tests"]


# The time goes to what decides bars. Of `bench model` it goes to the compiler above all: five dense models that the bars need, each compiled as
# it is and then, in the time that the others leave, with max-autotune. A comparison with a dense model that was not compiled decides no bar.
GPU_PARTS = (
    Part(GPU_TESTS, 2.5, _gpu_tests, needs=("pytest",), writes=GPU_TESTS_JSON),
    Part(
        "model",
        7.0,
        _compiled(
            "model",
            *("--model", "large", "base", "small", "--batch", "8", "1", "32", "--layout", "spread", "realistic"),
            *("--size", "1024", "512", "768"),
            start=20.0,
            timed=0.4,
            compiling=0.55,
        ),
        writes=MODEL,
        bars=("P1", "P2", "P3", "P4", "P5", "P11", "P14", "P16"),
    ),
    Part(
        "kernels",
        2.5,
        _compiled("kernels", start=35.0, timed=0.25, compiling=0.35),
        writes=KERNELS,
        bars=("P6", "P7", "P8", "P9", "P10", "P12", "P13"),
    ),
    # These two compile what the model part has compiled before, which the compiler's cache makes short.
    Part("peers", 1.5, _compiled("peers", "--batch", "8", start=20.0, timed=0.45, compiling=0.45), writes=PEERS),
    # A run of its own: the profiler stays attached to the driver and would slow down what is timed after it.
    Part(
        "profile",
        1.0,
        _compiled(
            "model",
            *("--profile", "--batch", "8", "--layout", "spread"),
            *(word for name in PROFILED for word in ("--contender", name)),
            start=20.0,
            timed=0.45,
            compiling=0.45,
        ),
        folder="profile",
        writes=PROFILE,
    ),
)
CPU_PARTS = (
    Part("main job", 6.0, _main_job(start=100.0), writes=MAIN, bars=("P15",)),
    Part(
        "model",
        2.0,
        _compiled("model", "--layout", "spread", "realistic", start=15.0, timed=0.6, compiling=0.0),
        writes=MODEL,
    ),
    Part("kernels", 2.0, _compiled("kernels", start=15.0, timed=0.25, compiling=0.0), writes=KERNELS),
    Part("peers", 1.0, _compiled("peers", start=15.0, timed=0.6, compiling=0.0), writes=PEERS),
)
