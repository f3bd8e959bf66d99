"""The budget of torch.compile, where it is so small that the compiler itself is hardly loaded in time."""

from __future__ import annotations

import subprocess
import sys

from bench.environment import REPOSITORY

PROGRAM = """
import torch
from bench.compiling import CompileBudget
for tenths in range(1, 12):
    budget = CompileBudget(tenths / 600, torch.device("cpu"))
    budget.spend(lambda: torch.compile(lambda x: x.sin().sum(0), backend="eager")(torch.ones(8, 8)))
torch.compiler.reset()
print(CompileBudget(1.0, torch.device("cpu")).spend(lambda: torch.compile(torch.sin, backend="eager")(torch.ones(8))))
"""


def test_a_compiler_that_is_cut_short_can_still_be_reset() -> None:
    """In a process of its own: here the compiler may be loaded already."""
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "None\n"
