"""The model layer is step_kernels.model; the checkout's folder ``model`` refuses to be imported by that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import step_kernels.model

ROOT = Path(__file__).parents[2]


def test_bare_import_is_refused_with_the_right_name() -> None:
    run = subprocess.run([sys.executable, "-c", "import model"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ImportError: import this package as 'step_kernels.model', not as 'model'" in run.stderr


def test_every_exported_name_exists() -> None:
    missing = [name for name in step_kernels.model.__all__ if not hasattr(step_kernels.model, name)]
    assert not missing
