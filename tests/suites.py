"""Kernel tests, and for time some others, in processes of their own: each keeps one core busy, and so does the process that starts them.

tests/interpreter needs TRITON_INTERPRET=1 before Triton is imported; tests/aot needs the compiler, which that would replace; tests/gpu
need a GPU, or what stands in for one. A process takes a whole folder, since it spends seconds on its imports.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from sampling import SAMPLE

TESTS = Path(__file__).parent
# Of a plain pytest, for time; by hand each folder runs whole.
SAMPLES = {"aot": "12", "interpreter": "8", "compile": "3"}

# The gpu tests on the stand-in: one case of each, without those that keep a CPU busy. All by hand: pytest -m gpu --standin=launch
LONG = (
    "test_model or test_bench or test_capture or test_transformers or runs_repeat or long_images or realistic_sizes "
    "or leaving_out or beyond_the_labels or captured_layer or without_descriptors or of_interpolation"
)
STANDINS: dict[str, list[Any]] = {
    "standin-launch": [TESTS / "standin", TESTS / "gpu", "-k", f"not ({LONG})"],
    "standin-reference": [
        TESTS / "standin",
        TESTS / "gpu/test_capture.py",
        "-k",
        "standin or named or smaller_batches or replayed",
    ],
}

# Ordinary tests, beside the other ones for time: folders of them.
ORDINARY: dict[str, list[Any]] = {name: [TESTS / name] for name in ("bench", "compile", "train") if SAMPLE == "1"}
# The longest first, since cores are idle at the end for the length of the last one.
SUITES = {"aot": [TESTS / "aot"], **ORDINARY, "interpreter": [TESTS / "interpreter"], **STANDINS}
if importlib.util.find_spec("triton") is None:
    SUITES = {}


def left_to_a_suite(path: Path, config: pytest.Config) -> bool | None:
    """Whether a folder of ORDINARY is not to be collected here, as the command asks for no part of it."""
    asked = config.option.keyword or config.option.markexpr
    if asked or path.name not in SUITES or [path] != ORDINARY.get(path.name):
        return None
    named = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path == each or path in each.parents for each in named) else True


class Suites:
    """Runs of the chosen suites. One core is left to the ordinary tests until ``wait`` is called."""

    def __init__(self, names: list[str]) -> None:
        self._all_cores = self._stopped = False
        self._processes: list[subprocess.Popen[str]] = []
        self._runs: dict[str, Future] = {name: Future() for name in names}
        self._waiting = deque(names)
        for _ in range(max(1, (os.cpu_count() or 1) - 1)):
            self._take_a_core()

    def _take_a_core(self) -> None:
        threading.Thread(target=self._one_after_the_other, daemon=True).start()

    def _one_after_the_other(self) -> None:
        with contextlib.suppress(IndexError):  # none is waiting
            while True:
                name = self._waiting.popleft()
                try:
                    self._runs[name].set_result(self._run(name))
                except Exception as error:
                    self._runs[name].set_exception(error)

    def wait(self, name: str) -> tuple[int, str]:
        """Exit status and output."""
        if not self._all_cores:
            self._all_cores = True
            self._take_a_core()
        return self._runs[name].result()

    def stop(self) -> None:
        """Nothing outlives the session, however it ends."""
        self._stopped = True
        self._waiting.clear()
        for process in self._processes:
            process.terminate()

    def _run(self, name: str) -> tuple[int, str]:
        command, mode = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], name.partition("standin-")[2]
        if mode:
            command += [f"--standin={mode}"]
        elif name not in ORDINARY:
            command += ["-o", "filterwarnings=default"]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["OMP_NUM_THREADS"] = "1"
        folder = name.partition("-")[0]
        if folder == "interpreter":
            environment["TRITON_INTERPRET"] = "1"
        if folder in SAMPLES and SAMPLE == "1":
            environment["KERNEL_TEST_SAMPLE"] = SAMPLES[folder]
        if mode:
            environment |= {"KERNEL_TEST_SAMPLE": "each", "KERNEL_TEST_SHIFT": "0"}
        if self._stopped:
            return 1, "not run"
        process = subprocess.Popen(
            [*command, *map(str, SUITES[name])],
            env=environment,
            cwd=TESTS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        output, _ = process.communicate()
        return process.returncode, output


SESSION = pytest.StashKey[Suites]()


def start(session: pytest.Session) -> None:
    """Before the first test runs: the suites that are among the tests."""
    names = [item.callspec.params["suite"] for item in session.items if "suites" in getattr(item, "fixturenames", ())]
    if names and not session.config.option.collectonly:
        session.config.stash[SESSION] = Suites(names)


def stop(session: pytest.Session) -> None:
    if SESSION in session.config.stash:
        session.config.stash[SESSION].stop()
