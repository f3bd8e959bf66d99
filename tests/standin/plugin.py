"""pytest's side: ``--standin`` (ops that would run as kernels run their reference), ``--standin=launch`` (their launchers as well) and
``--standin=compile`` (and Triton's compiler, for its cache).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

MODES = ("reference", "launch", "compile")
HELP = "run the gpu tests on a stand-in for a GPU: ops return what their reference computes; 'launch' runs their launchers too; 'compile' also fills Triton's cache"


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--standin", nargs="?", const="reference", choices=MODES, help=HELP)
    parser.addoption(
        "--standin-lines", action="store_true", help="fail where lines on CUDA are not reached: see standin/lines.py"
    )


def configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    mode = config.getoption("--standin")
    if mode is not None:
        os.environ.pop("TRITON_INTERPRET", None)
        from . import device

        device.install()
        from . import launches, lines

        launches.install(mode)
        config.pluginmanager.register(StandInPlugin(mode), "standin")
        if config.getoption("--standin-lines"):
            lines.watch()


class StandInPlugin:
    def __init__(self, mode: str) -> None:
        from . import launches, lines

        self.mode, self.launches, self.lines = mode, launches, lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """A problem fails its test also where that, or bench, takes an exception for a result."""
        self.launches.problems.clear()
        yield
        assert not self.launches.problems, self.launches.problems

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.lines.stop()
        if self.lines.executed and self.lines.complaints() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.mode != "reference":
            variants = self.launches.variants
            total, launched = variants.total(), self.launches.launched.total()
            terminalreporter.section(f"{total} variants of {len(variants)} kernels, {launched} launches")
            for name, count in variants.most_common():
                terminalreporter.write_line(f"{count:5} {name}")
        if self.lines.executed:
            terminalreporter.section("lines on CUDA")
            terminalreporter.write_line("\n".join(self.lines.complaints()) or "each reached, or listed with the reason")
